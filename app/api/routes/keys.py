"""API keys of the caller's project: made, listed, rotated, revoked."""

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from app.api.dependencies import KeysAdmin, ResourcesDep, SessionDep, WriterDep
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Deleted, Page, build_page
from app.api.schemas.keys import ApiKeyObject, CreatedKeyObject, show_created_key, show_key
from app.db.session import transaction
from app.domain.identifiers import parse_id
from app.domain.keys import CreateKey, RotateKey
from app.services import keys
from app.services.audit import sign

router = APIRouter(prefix="/v1/api_keys", tags=["keys"])

ID = "api_key_id"
HIDDEN = "value"  # never kept in plain text, so a replayed answer comes without it


@router.post("", response_model=CreatedKeyObject)
def create_api_key(body: CreateKey, caller: KeysAdmin, writer: WriterDep) -> Response:
    """Makes a key with scopes that the caller has; the answer alone holds its text."""

    def work(session: Session) -> CreatedKeyObject:
        return show_created_key(keys.grant_key(session, caller, body))

    return writer.run(caller, body, work, hidden=HIDDEN)


@router.get("")
def list_api_keys(
    session: SessionDep, caller: KeysAdmin, after: After = None, limit: Limit = 20
) -> Page[ApiKeyObject]:
    """The project's keys that are not revoked, newest first."""
    found, has_more = keys.list_project_keys(
        session, caller.project_id, after=parse_after("api_key", after), limit=limit
    )
    return build_page([show_key(row) for row in found], has_more=has_more)


@router.get("/{api_key_id}")
def retrieve_api_key(api_key_id: str, session: SessionDep, caller: KeysAdmin) -> ApiKeyObject:
    """One key."""
    key = parse_id("api_key", api_key_id, param=ID)
    return show_key(keys.get_key(session, caller.project_id, key))


@router.post("/{api_key_id}/rotate", response_model=CreatedKeyObject)
def rotate_api_key(
    api_key_id: str, caller: KeysAdmin, writer: WriterDep, body: RotateKey | None = None
) -> Response:
    """Makes a key that replaces this one; both work for `overlap_seconds` (a day), then the new one alone."""
    key, wish = parse_id("api_key", api_key_id, param=ID), body or RotateKey()

    def work(session: Session) -> CreatedKeyObject:
        return show_created_key(keys.rotate_key(session, caller, key, wish.overlap_seconds))

    return writer.run(caller, wish, work, hidden=HIDDEN)


@router.delete("/{api_key_id}")
def revoke_api_key(api_key_id: str, caller: KeysAdmin, resources: ResourcesDep) -> Deleted:
    """Revokes a key; within seconds it works nowhere."""
    key = parse_id("api_key", api_key_id, param=ID)
    with transaction(resources.session_factory) as session:
        row = keys.get_key(session, caller.project_id, key)
        keys.revoke_key(session, row.key_id, project_id=caller.project_id)
        sign(session)
    resources.known_keys.forget(row.key_id)
    return Deleted(id=api_key_id, object="api_key")
