"""The short way in for results that nothing watches: whom they are of in one query, all their rows in another."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import Session

from app.db.models import Job, ModelVersion


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whose result it is, and what the run behind it watches."""

    type: str
    key: str
    job_id: UUID | None  # of a job itself
    model_version_id: UUID | None
    branch: int | None
    watched: frozenset[str]  # names of benchmarks, some pinned as `name@3`


@dataclass(frozen=True, slots=True)
class PlainRow:
    """An evaluation that was posted and is compared with nothing."""

    id: UUID
    recipient: Recipient
    benchmark: str
    metric: str
    step: int | None
    value: float
    stderr: float | None
    n_samples: int | None
    is_paired: bool
    measured_at: datetime
    created_at: datetime

    purpose: ClassVar[str] = "monitor"
    source: ClassVar[str] = "external"
    benchmark_version_id: ClassVar[UUID | None] = None
    scores: ClassVar[bytes | None] = None
    tokens: ClassVar[bytes | None] = None

    @property
    def subject_type(self) -> str:
        """As an evaluation has it."""
        return self.recipient.type

    @property
    def subject_key(self) -> str:
        """As an evaluation has it."""
        return self.recipient.key

    @property
    def branch(self) -> int | None:
        """As an evaluation has it."""
        return self.recipient.branch


#: One statement for all rows, which come as one text: a parameter for each field of each row costs many times that.
INSERT = text("""
    INSERT INTO evaluations (
        id, project_id, subject_type, subject_key, job_id, model_version_id, branch, benchmark, metric,
        purpose, source, step, value, stderr, n_samples, is_paired, measured_at, created_at
    )
    SELECT id, :project_id, subject_type, subject_key, job_id, model_version_id, branch, benchmark, metric,
           :purpose, :source, step, value, stderr, n_samples, is_paired,
           coalesce(measured_at, :created_at), :created_at
    FROM ROWS FROM (json_to_recordset(CAST(:rows AS json)) AS (
        id uuid, subject_type text, subject_key text, job_id uuid, model_version_id uuid, branch bigint,
        benchmark text, metric text, step bigint, value double precision, stderr double precision,
        n_samples bigint, is_paired boolean, measured_at timestamptz
    )) WITH ORDINALITY AS posted (
        id, subject_type, subject_key, job_id, model_version_id, branch, benchmark, metric, step, value,
        stderr, n_samples, is_paired, measured_at, place
    )
    ORDER BY place
""")


class PostedResultRepository:
    """Posted results on their way in."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def now(self) -> datetime:
        """The database's clock."""
        found: datetime = self._session.scalars(select(func.clock_timestamp())).one()
        return found

    def find_jobs(self, project_id: UUID, ids: Collection[UUID]) -> dict[UUID, Recipient]:
        """The project's jobs among these."""
        query = select(Job.id, Job.branch, _watched()).where(
            Job.project_id == project_id, Job.id.in_(ids)
        )
        return {
            key: Recipient("fine_tuning.job", str(key), key, None, branch, frozenset(names or ()))
            for key, branch, names in self._session.execute(query)
        }

    def find_models(self, project_id: UUID, names: Collection[str]) -> dict[str, Recipient]:
        """The project's live model versions of these names whose job is the project's too."""
        query = (
            select(ModelVersion.id, ModelVersion.name, _watched())
            .join(Job, Job.id == ModelVersion.job_id)
            .where(
                ModelVersion.project_id == project_id,
                Job.project_id == project_id,
                ModelVersion.name.in_(names),
                ModelVersion.deleted_at.is_(None),
            )
        )
        return {
            name: Recipient("model", name, None, key, None, frozenset(watched or ()))
            for key, name, watched in self._session.execute(query)
        }

    def add(self, project_id: UUID, rows: Sequence[PlainRow]) -> None:
        """Writes rows that were made at one time, recorded in their order."""
        sent = json.dumps([_describe(row) for row in rows])
        constant = {
            "purpose": PlainRow.purpose,
            "source": PlainRow.source,
            "created_at": rows[0].created_at,
        }
        self._session.execute(INSERT, {"project_id": project_id, "rows": sent} | constant)


def _describe(row: PlainRow) -> dict[str, Any]:
    of = row.recipient
    return {
        "id": row.id.hex,
        "subject_type": of.type,
        "subject_key": of.key,
        "job_id": None if of.job_id is None else of.job_id.hex,
        "model_version_id": None if of.model_version_id is None else of.model_version_id.hex,
        "branch": of.branch,
        "benchmark": row.benchmark,
        "metric": row.metric,
        "step": row.step,
        "value": row.value,
        "stderr": row.stderr,
        "n_samples": row.n_samples,
        "is_paired": row.is_paired,
        # Most are measured just now; a time costs more to write than all the rest of a row.
        "measured_at": (None if row.measured_at is row.created_at else row.measured_at.isoformat()),
    }


def _watched() -> ColumnElement[list[str] | None]:
    """Names of a run's benchmarks alone: the plan also holds their baselines, item by item."""
    return func.jsonb_path_query_array(Job.run_plan, text("'$.benchmarks[*].name'"))
