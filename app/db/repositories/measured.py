"""Queries on measured runs."""

from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.models import BaseModel, File, Job, MeasuredRun
from app.domain.rows import RowFormat


class MeasuredJob(NamedTuple):
    """A measured run, with what it was a run of."""

    measured: dict[str, Any]
    spec: dict[str, Any]
    details: dict[str, Any]  # of the base model


class MeasuredRepository:
    """What finished runs measured."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(
        self, job_id: UUID, base_model_id: UUID, device_class: str, measured: dict[str, Any]
    ) -> None:
        """Keeps what a job measured; of a job that is there already nothing changes."""
        self._session.execute(
            insert(MeasuredRun)
            .values(
                job_id=job_id,
                base_model_id=base_model_id,
                device_class=device_class,
                measured=measured,
            )
            .on_conflict_do_nothing(index_elements=["job_id"])
        )

    def list_classes(self) -> list[str]:
        """Device classes with a measured run, the one measured last first."""
        query = (
            select(MeasuredRun.device_class)
            .group_by(MeasuredRun.device_class)
            .order_by(func.max(MeasuredRun.seq).desc())
        )
        return list(self._session.scalars(query))

    def list_latest(self, device_class: str, limit: int) -> list[MeasuredJob]:
        """The latest runs of a device class."""
        rows = self._session.execute(
            select(MeasuredRun.measured, Job.spec, BaseModel.details)
            .join(Job, Job.id == MeasuredRun.job_id)
            .join(BaseModel, BaseModel.id == MeasuredRun.base_model_id)
            .where(MeasuredRun.device_class == device_class)
            .order_by(MeasuredRun.seq.desc())
            .limit(limit)
        )
        return [MeasuredJob(*row) for row in rows]

    def find_file_bytes(
        self, base_model_id: UUID, *, compares: bool = False
    ) -> tuple[dict[str, Any], int, int] | None:
        """The latest run on a base model with the bytes and rows of its training file.

        Args:
            base_model_id: The model.
            compares: Of a file whose rows compare answers, or else of one whose rows show them.
        """
        found, wanted = File.report["format"].as_string(), RowFormat.PREFERENCE.value
        row = self._session.execute(
            select(MeasuredRun.measured, File.size_bytes, File.report["num_rows"].as_integer())
            .join(Job, Job.id == MeasuredRun.job_id)
            .join(File, File.id == Job.training_file_id)
            .where(
                MeasuredRun.base_model_id == base_model_id,
                File.report["num_rows"].isnot(None),
                found == wanted if compares else found.is_distinct_from(wanted),
            )
            .order_by(MeasuredRun.seq.desc())
            .limit(1)
        ).first()
        return None if row is None else (row[0], row[1], row[2])
