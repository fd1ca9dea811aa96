"""Uploaded and produced files."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class File(Record):
    """A file of a project, or of the operator when `project_id` is null; contents by sha256."""

    __tablename__ = "files"

    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]  # `fine-tune`, `evals`, `fine-tune-results`, ...
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    path: Mapped[str]  # under the storage root
    status: Mapped[str]  # `uploaded`, `processed`, `error`
    status_details: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]  # of the line check: row format, number of rows
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
