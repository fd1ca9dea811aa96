"""The audit log."""

from uuid import UUID

from sqlalchemy import ForeignKey, Index, Text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class AuditEntry(Record):
    """One call that changes something, or was refused; the database takes no change of it back."""

    __tablename__ = "audit_log"
    __table_args__ = (
        Index("ix_audit_log_project", "project_id", "seq"),
        Index("ix_audit_log_objects", "object_ids", postgresql_using="gin"),
    )

    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"))  # null: operator's
    actor: Mapped[str]  # a key's public id, or `operator:<user of the system>`
    method: Mapped[str]  # of HTTP, or `CLI`
    route: Mapped[str]  # with the names of its parameters, or the command
    object_ids: Mapped[list[str]] = mapped_column(ARRAY(Text))  # from the path and the answer
    status: Mapped[int]  # of the answer; a command that was carried out has 200
    request_id: Mapped[str | None]
    address: Mapped[str | None]
