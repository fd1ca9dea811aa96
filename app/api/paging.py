"""Query parameters of lists, and their place in a URL such as `metadata[key]=value`."""

import re
from collections.abc import Iterable
from typing import Annotated
from uuid import UUID

from fastapi import Query, Request

from app.domain.identifiers import parse_id
from app.errors import BadRequest

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[
    str | None, Query(max_length=128, description="Id of the last item of the page before")
]

_METADATA = re.compile(r"metadata\[(.+)\]")


def parse_after(kind: str, after: str | None) -> UUID | None:
    """The row's uuid of a cursor.

    Raises:
        NotFound: It is no id of this kind.
    """
    return None if after is None else parse_id(kind, after, param="after")


def metadata_filter(request: Request) -> tuple[dict[str, str], bool]:
    """The pairs of `metadata[key]=value`, and whether `metadata=null` asks for jobs without any."""
    return _pairs(request.query_params.multi_items()), (
        request.query_params.get("metadata") == "null"
    )


def _pairs(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    found = {}
    for name, value in items:
        match = _METADATA.fullmatch(name)
        if match is not None:
            found[match[1]] = value
    return found


def wants(request: Request, what: str, *, known: tuple[str, ...] = ()) -> bool:
    """Whether `include` names something; lists come as `include=x`, or as `include[]=x` from the openai client.

    Args:
        request: With the query.
        what: That is asked about.
        known: What else the route can include.

    Raises:
        BadRequest: It names something else too.
    """
    query = request.query_params
    named = [*query.getlist("include"), *query.getlist("include[]")]
    for name in named:
        if name != what and name not in known:
            names = " and ".join(f"'{each}'" for each in sorted({what, *known}))
            raise BadRequest(f"include: only {names} is known here.", "include")
    return what in named
