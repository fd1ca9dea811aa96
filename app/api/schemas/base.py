"""What every response body shares: the base, pages, and how times are shown."""

from datetime import datetime
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

Item = TypeVar("Item", bound="Identified")


class Schema(BaseModel):
    """A response body; numbers that JSON lacks become null."""

    model_config = ConfigDict(ser_json_inf_nan="null")


class Identified(Schema):
    """Something with an id."""

    id: str


class Page(Schema, Generic[Item]):
    """A page of a list; the next one comes with `after` set to `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(Identified):
    """The answer to a deletion."""

    object: str
    deleted: Literal[True] = True


def build_page(items: list[Item], *, has_more: bool) -> Page[Item]:
    """A page of these items."""
    return Page[Item](
        data=items,
        has_more=has_more,
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else None,
    )


def unix(time: datetime) -> int:
    """Whole seconds since 1970."""
    return int(time.timestamp())


def unix_or_none(time: datetime | None) -> int | None:
    """Whole seconds since 1970, if there is a time."""
    return None if time is None else unix(time)
