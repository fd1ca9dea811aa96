"""Published model versions."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class ModelVersion(Record):
    """An immutable artifact with its lineage."""

    __tablename__ = "model_versions"

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(unique=True)  # ft:<base>:<project>:<suffix>:<id>
    base_model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"))
    parent_version_id: Mapped[UUID | None] = mapped_column(ForeignKey("model_versions.id"))
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    checkpoint_id: Mapped[UUID | None] = mapped_column(ForeignKey("checkpoints.id"))
    status: Mapped[str]  # `pending`, `ready`, `failed`
    kind: Mapped[str]  # `adapter`, `full`
    alpha: Mapped[float]  # 1: the tuned weights as they are
    path: Mapped[str | None]  # under the storage root; null while pending
    sha256: Mapped[str | None]
    size_bytes: Mapped[int | None]
    retention: Mapped[str]  # `held`, `unproven`, `unwatched`, `off`
    verdict: Mapped[dict[str, Any] | None]  # a Reading on the report set
    reason: Mapped[str | None]  # `could_not_hold` and the like
    deleted_at: Mapped[datetime | None]
