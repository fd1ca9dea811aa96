"""The audit log of the caller's project."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from app.api.dependencies import SessionDep, allow
from app.api.paging import After, Limit, parse_after
from app.api.schemas.audit_log import AuditEntryObject, show_entry
from app.api.schemas.base import Page, build_page
from app.db.repositories.audit import AuditFilter
from app.domain.scopes import Caller, Scope
from app.services.audit import list_entries

router = APIRouter(prefix="/v1/audit_log", tags=["audit log"])

LAST_SECOND = 253_402_300_799  # of the year 9999
AuditReader = Annotated[Caller, Depends(allow(Scope.AUDIT_READ))]
Second = Annotated[int | None, Query(ge=0, le=LAST_SECOND, description="Unix time")]
Name = Annotated[str | None, Query(max_length=512)]


@router.get("")
def list_audit_log(  # noqa: PLR0913 - one parameter a filter
    session: SessionDep,
    caller: AuditReader,
    actor: Name = None,
    object_id: Name = None,
    since: Second = None,
    until: Second = None,
    after: After = None,
    limit: Limit = 20,
) -> Page[AuditEntryObject]:
    """Who changed what, newest first: every call that changed something or was refused."""
    wanted = AuditFilter(actor, object_id, _moment(since), _moment(until))
    found, has_more = list_entries(
        session, caller.project_id, wanted, after=parse_after("audit_entry", after), limit=limit
    )
    return build_page([show_entry(row) for row in found], has_more=has_more)


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
