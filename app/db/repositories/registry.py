"""Queries on published model versions."""

import re
from typing import Final
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Job, ModelVersion
from app.domain.states import JobKind
from app.errors import NotFound

_EIGHT_DIGITS: Final = re.compile(r"[0-9a-f]{8}")


class RegistryRepository:
    """Model versions of a project that are not deleted."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, version: ModelVersion) -> None:
        """Keeps a new version."""
        self._session.add(version)
        self._session.flush()
        self._session.refresh(version)

    def get(self, project_id: UUID, name: str, *, for_update: bool = False) -> ModelVersion:
        """The version of this name.

        Raises:
            NotFound: The project has none.
        """
        query = select(ModelVersion).where(
            ModelVersion.project_id == project_id,
            ModelVersion.name == name,
            ModelVersion.deleted_at.is_(None),
        )
        found = self._session.scalar(query.with_for_update() if for_update else query)
        if found is None:
            raise NotFound(f"No model is called '{name[:200]}'.", "model", "model_not_found")
        return found

    def find_job_of(self, project_id: UUID, name: str) -> Job | None:
        """The job that published the version of this name, deleted or not."""
        return self._session.scalar(
            select(Job)
            .join(ModelVersion, ModelVersion.id == Job.model_version_id)
            .where(
                Job.project_id == project_id,
                Job.kind == JobKind.FINE_TUNING,
                ModelVersion.name == name,
            )
        )

    def list_jobs_like(self, project_id: UUID, digits: str) -> list[Job]:
        """The project's fine-tuning jobs whose ids begin with these 8 hex digits; none for other texts."""
        if _EIGHT_DIGITS.fullmatch(digits) is None:
            return []
        first, last = UUID(hex=digits + "0" * 24), UUID(hex=digits + "f" * 24)
        return list(
            self._session.scalars(
                select(Job).where(
                    Job.id.between(first, last),
                    Job.project_id == project_id,
                    Job.kind == JobKind.FINE_TUNING,
                )
            )
        )

    def is_started_from(self, version: ModelVersion) -> bool:
        """Whether a job that has not ended starts from this version."""
        query = select(Job.id).where(Job.start_version_id == version.id, Job.finished_at.is_(None))
        return self._session.scalar(query.limit(1)) is not None

    def list_all(self, project_id: UUID) -> list[ModelVersion]:
        """Every version, newest first."""
        return list(
            self._session.scalars(
                select(ModelVersion)
                .where(ModelVersion.project_id == project_id, ModelVersion.deleted_at.is_(None))
                .order_by(ModelVersion.seq.desc())
            )
        )

    def mark_deleted(self, version: ModelVersion) -> None:
        """Takes a version out of sight; its row stays for the jobs that name it."""
        version.deleted_at = func.clock_timestamp()
        self._session.flush()

    def base_names(self, versions: list[ModelVersion]) -> dict[UUID, str]:
        """Names of the base models of versions, by the base's id."""
        ids = {version.base_model_id for version in versions}
        query = select(BaseModel.id, BaseModel.name).where(BaseModel.id.in_(ids))
        return dict(self._session.execute(query).all())

    def parent_names(self, versions: list[ModelVersion]) -> dict[UUID, str]:
        """Names of the versions that versions started from, by the parent's id."""
        ids = {v.parent_version_id for v in versions if v.parent_version_id is not None}
        query = select(ModelVersion.id, ModelVersion.name).where(ModelVersion.id.in_(ids))
        return dict(self._session.execute(query).all())

    def is_being_made(self, version: ModelVersion) -> bool:
        """Whether an export job that has not ended writes this version."""
        query = select(Job.id).where(
            Job.model_version_id == version.id,
            Job.kind == JobKind.EXPORT,
            Job.finished_at.is_(None),
        )
        return self._session.scalar(query.limit(1)) is not None
