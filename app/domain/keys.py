"""Request bodies about API keys."""

from typing import Annotated, Final

from pydantic import Field

from app.domain.frozen import Frozen

MAX_LIFE_SECONDS: Final = 10 * 365 * 86_400
MAX_OVERLAP_SECONDS: Final = 30 * 86_400

ScopeName = Annotated[str, Field(min_length=1, max_length=64)]


class CreateKey(Frozen):
    """`POST /v1/api_keys`: a key of the caller's project, with no scope that the caller lacks."""

    name: str = Field(min_length=1, max_length=128, pattern=r"\S")
    #: None: the caller's, without making keys and passing gates.
    scopes: tuple[ScopeName, ...] | None = Field(default=None, min_length=1, max_length=64)
    expires_in_seconds: int | None = Field(default=None, ge=1, le=MAX_LIFE_SECONDS)  # None: never


class RotateKey(Frozen):
    """`POST /v1/api_keys/{id}/rotate`: for so long the old key works beside the new one."""

    overlap_seconds: int = Field(default=86_400, ge=0, le=MAX_OVERLAP_SECONDS)
