"""Registered models: versions, aliases with compare-and-set, promotion through a gate, rollback.

An alias's ETag is its revision. `If-Match` holds a move to that revision (412 when it is another), `If-Match: *`
to an alias that exists, `If-None-Match: *` to one that does not; without them a move is unconditional.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Response
from sqlalchemy.orm import Session

from app.api.dependencies import ModelsReader, ModelsWriter, SessionDep, WriterDep
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Deleted, Page, build_page
from app.api.schemas.registered_models import (
    AliasChangeObject,
    AliasObject,
    RegisteredModelObject,
    RegisteredVersionObject,
    show_alias,
    show_change,
    show_registered_model,
    show_version,
)
from app.domain.aliases import (
    ALIAS,
    CreateRegisteredModel,
    Promote,
    RegisterVersion,
    RollBackAlias,
    UpdateRegisteredModel,
)
from app.errors import BadRequest, NotFound
from app.services import aliases, aliases_query
from app.services import registered_models as registered

router = APIRouter(prefix="/v1/registered_models", tags=["registered models"])

_TAG = re.compile(r'"?(\d{1,18})"?')

Name = Annotated[str, Path(max_length=256)]
Number = Annotated[int, Path(ge=1, le=2**53)]
AliasName = Annotated[str, Path(max_length=256)]
IfMatch = Annotated[
    str | None, Header(max_length=256, description="The ETag that was read, or `*`: 412 otherwise")
]
IfNoneMatch = Annotated[
    str | None, Header(max_length=256, description="`*`: 412 when the alias exists")
]


def get_condition(if_match: IfMatch = None, if_none_match: IfNoneMatch = None) -> aliases.Condition:
    """What the request holds the alias to be."""
    if if_none_match is not None and if_none_match.strip() != "*":
        raise BadRequest("If-None-Match: only `*` has a meaning here.", "If-None-Match")
    tag = None if if_match is None else if_match.strip()
    found = None if tag is None or tag == "*" else _TAG.fullmatch(tag)
    if tag not in {None, "*"} and found is None:
        raise BadRequest("If-Match: send the ETag as it came, or `*`.", "If-Match")
    return aliases.Condition(
        revision=None if found is None else int(found[1]),
        must_exist=tag == "*",
        must_be_new=if_none_match is not None,
    )


ConditionDep = Annotated[aliases.Condition, Depends(get_condition)]


@router.post("", response_model=RegisteredModelObject)
def create_registered_model(
    body: CreateRegisteredModel, caller: ModelsWriter, writer: WriterDep
) -> Response:
    """Registers a name. `gate` is the least word on retention that is promoted: `held` or `unproven`."""

    def work(session: Session) -> RegisteredModelObject:
        row = registered.create_registered_model(session, caller.project_id, body)
        return show_registered_model(registered.show_registered(session, [row])[0])

    return writer.run(caller, body, work)


@router.get("")
def list_registered_models(
    session: SessionDep, caller: ModelsReader, after: After = None, limit: Limit = 20
) -> Page[RegisteredModelObject]:
    """The project's registered models, newest first."""
    found, has_more = registered.list_registered_models(
        session, caller.project_id, after=parse_after("registered_model", after), limit=limit
    )
    return build_page([show_registered_model(shown) for shown in found], has_more=has_more)


@router.get("/{registered_model}")
def retrieve_registered_model(
    registered_model: Name, session: SessionDep, caller: ModelsReader
) -> RegisteredModelObject:
    """One registered model."""
    found = registered.get_registered_model(session, caller.project_id, registered_model)
    return show_registered_model(found)


@router.patch("/{registered_model}")
def update_registered_model(
    registered_model: Name, body: UpdateRegisteredModel, session: SessionDep, caller: ModelsWriter
) -> RegisteredModelObject:
    """Changes what is given: description, metadata, gate, max_cumulative_drop."""
    row = registered.update_registered_model(session, caller.project_id, registered_model, body)
    return show_registered_model(registered.show_registered(session, [row])[0])


@router.post("/{registered_model}/versions", response_model=RegisteredVersionObject)
def register_version(
    registered_model: Name, body: RegisterVersion, caller: ModelsWriter, writer: WriterDep
) -> Response:
    """Makes a published model version number n+1; the same one again gets the number that it has."""

    def work(session: Session) -> RegisteredVersionObject:
        return show_version(
            registered.register_version(session, caller.project_id, registered_model, body)
        )

    return writer.run(caller, body, work)


@router.get("/{registered_model}/versions")
def list_versions(
    registered_model: Name,
    session: SessionDep,
    caller: ModelsReader,
    after: After = None,
    limit: Limit = 20,
) -> Page[RegisteredVersionObject]:
    """The ledger: every version, newest first, with what it lost against its parent and the lineage's root."""
    found, has_more = registered.list_versions(
        session,
        caller.project_id,
        registered_model,
        below=_number_after(registered_model, after),
        limit=limit,
    )
    return build_page([show_version(shown) for shown in found], has_more=has_more)


@router.get("/{registered_model}/versions/{version}")
def retrieve_version(
    registered_model: Name, version: Number, session: SessionDep, caller: ModelsReader
) -> RegisteredVersionObject:
    """One version with its place in the lineage."""
    return show_version(
        registered.get_version(session, caller.project_id, registered_model, version)
    )


@router.get("/{registered_model}/aliases")
def list_aliases(
    registered_model: Name, session: SessionDep, caller: ModelsReader
) -> Page[AliasObject]:
    """Every alias, by name."""
    found = aliases_query.list_aliases(session, caller.project_id, registered_model)
    return build_page([show_alias(shown) for shown in found], has_more=False)


@router.get("/{registered_model}/aliases/{alias}")
def retrieve_alias(
    registered_model: Name,
    alias: AliasName,
    session: SessionDep,
    caller: ModelsReader,
    response: Response,
) -> AliasObject:
    """Where an alias points; the ETag is its revision."""
    found = aliases_query.get_alias(session, caller.project_id, registered_model, alias)
    response.headers["etag"] = f'"{found.alias.revision}"'
    return show_alias(found)


@router.put("/{registered_model}/aliases/{alias}", response_model=AliasObject)
def put_alias(
    registered_model: Name,
    alias: AliasName,
    body: Promote,
    caller: ModelsWriter,
    writer: WriterDep,
    condition: ConditionDep,
) -> Response:
    """Points an alias at a version, through the gate; the alias is made when it is new. The same as `promote`."""
    return promote_alias(registered_model, alias, body, caller, writer, condition)


@router.post("/{registered_model}/aliases/{alias}/promote", response_model=AliasObject)
def promote_alias(
    registered_model: Name,
    alias: AliasName,
    body: Promote,
    caller: ModelsWriter,
    writer: WriterDep,
    condition: ConditionDep,
) -> Response:
    """Points an alias at a version, through the gate; `force` passes it with a reason and `models:force`."""
    if re.fullmatch(ALIAS, alias) is None:
        raise BadRequest(
            "alias: begin with a letter; up to 64 letters, digits, `.`, `_` and `-`.", "alias"
        )

    def work(session: Session) -> AliasObject:
        return show_alias(
            aliases.promote(session, caller, registered_model, alias, body, condition)
        )

    return _with_etag(lambda: writer.run(caller, body, work))


@router.post("/{registered_model}/aliases/{alias}/rollback", response_model=AliasObject)
def roll_back_alias(
    registered_model: Name,
    alias: AliasName,
    caller: ModelsWriter,
    writer: WriterDep,
    condition: ConditionDep,
    body: RollBackAlias | None = None,
) -> Response:
    """Points an alias back: `to` the last good version before (`previous`), or to a version's number."""
    wish = body or RollBackAlias()

    def work(session: Session) -> AliasObject:
        return show_alias(
            aliases.roll_back(session, caller, registered_model, alias, wish, condition)
        )

    return _with_etag(lambda: writer.run(caller, wish, work))


@router.delete("/{registered_model}/aliases/{alias}")
def delete_alias(
    registered_model: Name,
    alias: AliasName,
    session: SessionDep,
    caller: ModelsWriter,
    condition: ConditionDep,
) -> Deleted:
    """Takes an alias away; its history stays."""
    aliases.delete_alias(session, caller, registered_model, alias, condition)
    return Deleted(id=f"{registered_model}@{alias}", object="registered_model.alias.deleted")


@router.get("/{registered_model}/aliases/{alias}/history")
def list_history(
    registered_model: Name,
    alias: AliasName,
    session: SessionDep,
    caller: ModelsReader,
    after: After = None,
    limit: Limit = 20,
) -> Page[AliasChangeObject]:
    """Every move of an alias, newest first: who, why, from where to where."""
    found, has_more = aliases_query.list_history(
        session,
        caller.project_id,
        registered_model,
        alias,
        after=parse_after("alias_change", after),
        limit=limit,
    )
    return build_page([show_change(shown) for shown in found], has_more=has_more)


def _with_etag(answer: Callable[[], Response]) -> Response:
    response = answer()
    response.headers["etag"] = f'"{json.loads(bytes(response.body))["revision"]}"'
    return response


def _number_after(name: str, after: str | None) -> int | None:
    """The version's number in a cursor `name@3`.

    Raises:
        NotFound: It is no id of this registered model's versions.
    """
    if after is None:
        return None
    digits = after.removeprefix(f"{name}@")
    if digits == after or not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise NotFound("after: the registered model has no version with this id.", "after")
    return int(digits)
