"""The audit log: who changed what, written in the transaction of the change."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import AuditEntry
from app.db.repositories.audit import AuditFilter, AuditRepository
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.scopes import Caller

CLI: Final = "CLI"
DONE: Final = 200
MAX_ID: Final = 512  # characters that are kept of what a path names


@dataclass(slots=True)
class Trail:
    """One call that may change something, while it runs.

    Args:
        method: Of HTTP, or `CLI`.
        route: The path with the names of its parameters, or the command.
        request_id: Of the request.
        address: Where it came from.
        actor: Who it is; of a request known once its key has been checked.
        project_id: The actor's.
        object_ids: What it names.
        is_signed: Whether an entry was written in a transaction of the call.
    """

    method: str
    route: str
    request_id: str | None = None
    address: str | None = None
    actor: str | None = None
    project_id: UUID | None = None
    object_ids: list[str] = field(default_factory=list)
    is_signed: bool = False

    def name_caller(self, caller: Caller) -> None:
        """Says whose key it is."""
        self.actor, self.project_id = caller.key_id, caller.project_id


_current: ContextVar[Trail | None] = ContextVar("audit_trail", default=None)


@contextmanager
def following(trail: Trail) -> Iterator[Trail]:
    """Makes a call the one whose entry `sign` writes, within this context and the threads it starts work in."""
    token = _current.set(trail)
    try:
        yield trail
    finally:
        _current.reset(token)


def find_trail() -> Trail | None:
    """The call that runs here, if it is one that may change something."""
    return _current.get()


def operator_trail(command: str) -> Trail:
    """The trail of an operator's command."""
    return Trail(CLI, command, actor=f"operator:{_user()}")


def sign(
    session: Session,
    *object_ids: str | None,
    status: int = DONE,
    project_id: UUID | None = None,
) -> None:
    """Writes the entry of the call that runs here, to be committed with its change; nothing outside of one.

    Args:
        session: The change's.
        object_ids: What was made or changed, beside what the call names.
        status: Of the answer.
        project_id: Whose it is, of an operator's command.
    """
    trail = _current.get()
    if trail is None or trail.actor is None:
        return
    named = dict.fromkeys([*trail.object_ids, *(text for text in object_ids if text)])
    entry: dict[str, Any] = {
        "project_id": trail.project_id or project_id,
        "actor": trail.actor,
        "method": trail.method,
        "route": trail.route,
        "object_ids": [text[:MAX_ID].replace("\0", "") for text in named],
        "status": status,
        "request_id": trail.request_id,
        "address": trail.address,
    }
    AuditRepository(session).add(entry)
    trail.is_signed = True


def list_entries(
    session: Session,
    project_id: UUID,
    wanted: AuditFilter,
    *,
    after: UUID | None,
    limit: int,
) -> tuple[list[AuditEntry], bool]:
    """A page of a project's entries, newest first, and whether there are more.

    Raises:
        NotFound: `after` is no entry of the project.
    """
    repository = AuditRepository(session)
    last = None if after is None else repository.get(project_id, after, param="after")
    found = repository.list_page(project_id, wanted, after=last, limit=limit + 1)
    return found[:limit], len(found) > limit


def export_entries(factory: SessionFactory, wanted: AuditFilter) -> Iterator[dict[str, Any]]:
    """Every entry as a JSON object, oldest first; for the operator. No transaction is open in between."""
    last = 0
    while True:
        with transaction(factory) as session:
            found = AuditRepository(session).list_all(wanted, after_seq=last)
        for entry, project in found:
            yield _export(entry, project)
            last = entry.seq
        if not found:
            return


def _export(entry: AuditEntry, project: str) -> dict[str, Any]:
    return {
        "id": public_id("audit_entry", entry.id),
        "sequence": entry.seq,
        "created_at": entry.created_at.isoformat(),
        "actor": entry.actor,
        "project": project or None,
        "method": entry.method,
        "route": entry.route,
        "object_ids": entry.object_ids,
        "status": entry.status,
        "request_id": entry.request_id,
        "address": entry.address,
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        return "unknown"
