"""Queries on the scores that the ledger of a lineage rests on."""

from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import BenchmarkVersion, Evaluation, Job, ModelVersion
from app.domain.benchmarks import BenchmarkKind


class LineageRepository:
    """Model versions with their item scores."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find_live(self, project_id: UUID, names: Collection[str]) -> dict[str, ModelVersion]:
        """The project's versions of these names that are not deleted."""
        found = self._session.scalars(
            select(ModelVersion).where(
                ModelVersion.project_id == project_id,
                ModelVersion.name.in_(names),
                ModelVersion.deleted_at.is_(None),
            )
        )
        return {version.name: version for version in found}

    def list_evaluations(self, ids: Sequence[UUID]) -> list[Evaluation]:
        """Evaluations by id, in the order in which they were recorded."""
        return list(
            self._session.scalars(
                select(Evaluation).where(Evaluation.id.in_(ids)).order_by(Evaluation.seq)
            )
        )

    def run_plan_of(self, job_id: UUID) -> dict[str, Any] | None:
        """The latest attempt's plan."""
        return self._session.scalar(select(Job.run_plan).where(Job.id == job_id))

    def list_report(self, job_id: UUID, checkpoint_id: UUID) -> dict[UUID, Evaluation]:
        """Item scores of what a job published, by benchmark version."""
        found = self._session.scalars(
            select(Evaluation).where(
                Evaluation.job_id == job_id,
                Evaluation.checkpoint_id == checkpoint_id,
                Evaluation.purpose == "report",
                Evaluation.scores.is_not(None),
            )
        )
        return _by_version(found.all())

    def list_latest(self, model: str) -> dict[UUID, Evaluation]:
        """The latest item scores of a deployed model, by benchmark version."""
        found = self._session.scalars(
            select(Evaluation)
            .where(
                Evaluation.subject_type == "model",
                Evaluation.subject_key == model,
                Evaluation.scores.is_not(None),
                Evaluation.benchmark_version_id.is_not(None),
            )
            .ext(distinct_on(Evaluation.benchmark_version_id))
            .order_by(Evaluation.benchmark_version_id, Evaluation.seq.desc())
        )
        return _by_version(found.all())

    def list_general(self, version_ids: Sequence[UUID]) -> dict[UUID, BenchmarkVersion]:
        """Those of the benchmark versions that must not drop."""
        found = self._session.scalars(
            select(BenchmarkVersion).where(
                BenchmarkVersion.id.in_(version_ids),
                BenchmarkVersion.kind == BenchmarkKind.GENERAL,
            )
        )
        return {version.id: version for version in found}

    def find_baseline(self, key: str, version_id: UUID) -> Evaluation | None:
        """The root's scores on a benchmark version."""
        return self._session.scalar(
            select(Evaluation)
            .where(
                Evaluation.subject_type == "base_model",
                Evaluation.subject_key == key,
                Evaluation.benchmark_version_id == version_id,
                Evaluation.purpose == "baseline",
            )
            .order_by(Evaluation.seq)
            .limit(1)
        )


def _by_version(rows: Sequence[Evaluation]) -> dict[UUID, Evaluation]:
    return {row.benchmark_version_id: row for row in rows if row.benchmark_version_id is not None}
