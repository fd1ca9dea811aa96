"""Queries on the audit log."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from app.db.models import AuditEntry, Project
from app.db.repositories.paging import Query, newest_first
from app.errors import NotFound

READ_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries are wanted; what is None does not matter."""

    actor: str | None = None
    object_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class AuditRepository:
    """The audit log, which is added to and read."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, entry: dict[str, Any]) -> None:
        """Writes an entry; its time is the database's."""
        self._session.execute(insert(AuditEntry).values(entry))

    def get(self, project_id: UUID, entry_id: UUID, *, param: str) -> AuditEntry:
        """One entry of a project.

        Raises:
            NotFound: The project has no such entry.
        """
        entry = self._session.scalar(
            select(AuditEntry).where(AuditEntry.id == entry_id, AuditEntry.project_id == project_id)
        )
        if entry is None:
            raise NotFound("No entry of the audit log has this id.", param)
        return entry

    def list_page(
        self, project_id: UUID, wanted: AuditFilter, *, after: AuditEntry | None, limit: int
    ) -> list[AuditEntry]:
        """Entries of a project, newest first."""
        query = _matching(select(AuditEntry).where(AuditEntry.project_id == project_id), wanted)
        return list(
            self._session.scalars(newest_first(query, AuditEntry, after=after, limit=limit))
        )

    def list_all(self, wanted: AuditFilter, *, after_seq: int) -> list[tuple[AuditEntry, str]]:
        """The next entries of all projects and the operator, with the project's name or "", oldest first."""
        query = (
            select(AuditEntry, func.coalesce(Project.name, ""))
            .outerjoin(Project, Project.id == AuditEntry.project_id)
            .where(AuditEntry.seq > after_seq)
            .order_by(AuditEntry.seq)
            .limit(READ_AT_ONCE)
        )
        return [(entry, name) for entry, name in self._session.execute(_matching(query, wanted))]


def _matching(query: Query, wanted: AuditFilter) -> Query:
    if wanted.actor is not None:
        query = query.where(AuditEntry.actor == wanted.actor)
    if wanted.object_id is not None:
        query = query.where(AuditEntry.object_ids.contains([wanted.object_id]))
    if wanted.since is not None:
        query = query.where(AuditEntry.created_at >= wanted.since)
    if wanted.until is not None:
        query = query.where(AuditEntry.created_at < wanted.until)
    return query
