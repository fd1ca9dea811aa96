"""The audit log's entries."""

from typing import Literal

from app.api.schemas.base import Identified, unix
from app.db.models import AuditEntry
from app.domain.identifiers import public_id


class AuditEntryObject(Identified):
    """One call that changed something, or was refused."""

    object: Literal["audit_entry"] = "audit_entry"
    sequence: int  # rises; numbers of what was taken back are missing
    created_at: int
    actor: str  # a key's public part, or `operator:<user>`
    method: str
    route: str
    object_ids: list[str]
    status: int
    request_id: str | None
    address: str | None


def show_entry(row: AuditEntry) -> AuditEntryObject:
    """An entry as the project's admins see it."""
    return AuditEntryObject(
        id=public_id("audit_entry", row.id),
        sequence=row.seq,
        created_at=unix(row.created_at),
        actor=row.actor,
        method=row.method,
        route=row.route,
        object_ids=row.object_ids,
        status=row.status,
        request_id=row.request_id,
        address=row.address,
    )
