"""Uploads that come in parts, until they are one file."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record, enum_column
from app.domain.uploads import UploadStatus


class Upload(Record):
    """An announced file; its parts lie in a directory of its own until `cleared_at`."""

    __tablename__ = "uploads"
    __table_args__ = (
        Index("ix_uploads_uncleared", "expires_at", postgresql_where=text("cleared_at IS NULL")),
    )

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    size_bytes: Mapped[int]  # announced; the parts have to add up to it
    file_expires_seconds: Mapped[int | None]  # of the file, from its creation
    status: Mapped[UploadStatus] = mapped_column(enum_column(UploadStatus))
    expires_at: Mapped[datetime]
    part_ids: Mapped[list[Any] | None]  # that made the file, in order
    file_id: Mapped[UUID | None] = mapped_column(ForeignKey("files.id"))
    cleared_at: Mapped[datetime | None]  # its parts are gone


class UploadPart(Record):
    """One part; which come into the file, and in which order, is said at the end."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[UUID] = mapped_column(ForeignKey("uploads.id"), index=True)
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    path: Mapped[str]  # under the storage root
