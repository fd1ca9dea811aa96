"""Projects and their API keys."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Text, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class Project(Record):
    """A tenant; every query takes its id from the caller's key."""

    __tablename__ = "projects"

    name: Mapped[str] = mapped_column(unique=True)
    default_policy: Mapped[dict[str, Any] | None]  # a Policy; None: the built-in one
    retention_mandatory: Mapped[bool] = mapped_column(server_default=text("false"))
    #: Quotas; None: the server's own.
    max_queued_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_storage_bytes: Mapped[int | None]


class ApiKey(Record):
    """A bearer key `rt_live_<key_id>_<secret>`; only the secret's SHA-256 is kept."""

    __tablename__ = "api_keys"

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    key_id: Mapped[str] = mapped_column(unique=True)  # 8 characters, public
    secret_sha256: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # written at most once a minute
    revoked_at: Mapped[datetime | None]
    rotated_from_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
