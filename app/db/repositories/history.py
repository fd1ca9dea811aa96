"""Named queries over checkpoints, evaluations and decisions."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import BenchmarkVersion, Checkpoint, DecisionRow, Evaluation, Job, ModelVersion
from app.db.repositories.checkpoints import usable


class HistoryRepository:
    """What happened to a job, and the baselines that its readings are paired with."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def lock_job(self, job_id: UUID) -> Job | None:
        """The job, its row locked and read afresh."""
        statement = select(Job).where(Job.id == job_id).with_for_update()
        return self._session.scalar(statement.execution_options(populate_existing=True))

    def find_decision(
        self, job_id: UUID, branch: int, step: int, origin: str
    ) -> DecisionRow | None:
        """The decision recorded for an evaluation point."""
        return self._session.scalar(
            select(DecisionRow).where(
                DecisionRow.job_id == job_id,
                DecisionRow.branch == branch,
                DecisionRow.step == step,
                DecisionRow.origin == origin,
            )
        )

    def find_rollback(self, job: Job) -> DecisionRow | None:
        """The decision that began the job's present branch; None on branch 0."""
        return self._session.scalar(
            select(DecisionRow)
            .where(
                DecisionRow.job_id == job.id,
                DecisionRow.action == "roll_back",
                DecisionRow.state.in_(("applied", "overridden")),  # no mere proposal
                DecisionRow.branch == job.branch - 1,
            )
            .order_by(DecisionRow.seq.desc())
            .limit(1)
        )

    def count_looks(self, job_id: UUID) -> int:
        """Distinct evaluation points of a job, over all branches; what people ordered is no look."""
        statement = select(func.count()).where(
            DecisionRow.job_id == job_id,
            ~DecisionRow.origin.startswith("override:"),
            ~DecisionRow.origin.startswith("accept:"),
        )
        return self._session.scalar(statement) or 0

    def count_monitor_looks(self, model: str, before: UUID) -> int:
        """Looks at a model version in the last 30 days, not counting the one that began with row `before`."""
        first = select(Evaluation.seq).where(Evaluation.id == before).scalar_subquery()
        looks = (
            select(func.count().label("looks"))
            .where(
                Evaluation.subject_type == "model",
                Evaluation.subject_key == model,
                Evaluation.purpose == "monitor",
                Evaluation.seq < first,
                Evaluation.created_at > func.clock_timestamp() - timedelta(days=30),
            )
            .group_by(Evaluation.benchmark)
            .subquery()
        )
        return self._session.scalar(select(func.max(looks.c.looks))) or 0

    def find_model(self, project_id: UUID, name: str) -> ModelVersion | None:
        """A live model version of a project."""
        return self._session.scalar(
            select(ModelVersion).where(
                ModelVersion.project_id == project_id,
                ModelVersion.name == name,
                ModelVersion.deleted_at.is_(None),
            )
        )

    def find_checkpoint(self, job_id: UUID, branch: int, step: int) -> Checkpoint | None:
        """The newest attempt's checkpoint of a point."""
        return self._session.scalar(
            select(Checkpoint)
            .where(
                Checkpoint.job_id == job_id, Checkpoint.branch == branch, Checkpoint.step == step
            )
            .order_by(Checkpoint.attempt.desc())
            .limit(1)
        )

    def list_valid_checkpoints(self, job_id: UUID) -> Sequence[Checkpoint]:
        """Checkpoints that can be resumed or published, oldest step first; of each point the newest attempt's."""
        return self._session.scalars(
            select(Checkpoint)
            .where(*usable(job_id))
            .ext(distinct_on(Checkpoint.step, Checkpoint.branch))
            .order_by(Checkpoint.step, Checkpoint.branch, Checkpoint.attempt.desc())
        ).all()

    def supersede_after(self, job_id: UUID, step: int) -> None:
        """Marks the checkpoints after a rollback's target: never resumed, never published."""
        self._session.execute(
            update(Checkpoint)
            .where(
                Checkpoint.job_id == job_id,
                Checkpoint.step > step,
                Checkpoint.superseded.is_(False),
            )
            .values(superseded=True)
        )

    def list_evaluated(self, job_id: UUID, branch: int, step: int, purpose: str) -> set[UUID]:
        """Benchmark versions on which a run's point has been scored already."""
        found = self._session.scalars(
            select(Evaluation.benchmark_version_id).where(
                Evaluation.job_id == job_id,
                Evaluation.branch == branch,
                Evaluation.step == step,
                Evaluation.purpose == purpose,
                Evaluation.source == "run",
            )
        )
        return {version_id for version_id in found if version_id is not None}

    def find_latest_gate(self, job_id: UUID, version_id: UUID) -> Evaluation | None:
        """A run's newest scores of its own on a benchmark version; None before its first evaluation."""
        return self._session.scalar(
            select(Evaluation)
            .where(
                Evaluation.job_id == job_id,
                Evaluation.benchmark_version_id == version_id,
                Evaluation.purpose == "gate",
                Evaluation.source == "run",
            )
            .order_by(Evaluation.seq.desc())
            .limit(1)
        )

    def find_baseline(
        self, baseline_key: str, version_id: UUID, *, lock: bool = False
    ) -> Evaluation | None:
        """The base model's scores on a benchmark version; `lock` serialises those who add to them."""
        if lock:
            self._session.execute(
                select(BenchmarkVersion.id)
                .where(BenchmarkVersion.id == version_id)
                .with_for_update()
            )
        return self._session.scalar(
            select(Evaluation)
            .where(
                Evaluation.subject_type.in_(("base_model", "external_run")),
                Evaluation.subject_key == baseline_key,
                Evaluation.benchmark_version_id == version_id,
                Evaluation.purpose == "baseline",
            )
            .order_by(Evaluation.seq)
            .limit(1)
        )

    def list_versions(self, version_ids: Sequence[UUID]) -> dict[UUID, BenchmarkVersion]:
        """Benchmark versions by id."""
        found = self._session.scalars(
            select(BenchmarkVersion).where(BenchmarkVersion.id.in_(version_ids))
        )
        return {version.id: version for version in found}
