"""Benchmark results."""

from typing import Any, Literal

from pydantic import Field

from app.api.schemas.base import Identified, Schema, unix
from app.db.repositories.results import Points
from app.domain.identifiers import public_id
from app.domain.monitors import MonitorOutcome
from app.domain.wording import describe_reading
from app.services.results import RecordedLook
from app.services.results_query import ShownResult


class ShownSubject(Schema):
    """What was measured."""

    type: str
    id: str


class ResultItemObject(Schema):
    """One item's score; of `nll` the nats summed over so many tokens."""

    id: str
    score: float
    tokens: int | None = None


class SubjectScoreObject(Schema):
    """The mean over a subject's items; of `nll` in nats per token."""

    subject: str
    n_items: int
    value: float


class ResultObject(Identified):
    """One benchmark of one subject."""

    object: Literal["benchmark_result"] = "benchmark_result"
    created_at: int
    measured_at: int
    subject: ShownSubject
    benchmark: str
    benchmark_version_id: str | None
    metric: str
    value: float | None
    stderr: float | None
    n_samples: int | None
    step: int | None
    branch: int | None
    purpose: str
    source: str
    paired: bool
    items: list[ResultItemObject] | None = None
    subjects: list[SubjectScoreObject] | None = None


class PointsObject(Schema):
    """Results of one benchmark as columns of equal length; the next ones come with `after` set to `last_id`."""

    object: Literal["benchmark_result.points"] = "benchmark_result.points"
    steps: list[int | None]
    values: list[float | None]
    measured_at: list[int]
    has_more: bool
    first_id: str | None
    last_id: str | None


class LookObject(Schema):
    """What the sensor made of posted results that belong together."""

    object: Literal["retention.look"] = "retention.look"
    results: list[ResultObject]
    verdict: str | None
    message: str | None
    reading: dict[str, Any] | None
    decision: dict[str, Any] | None
    monitors: list[MonitorOutcome] = Field(default_factory=list)  # of a deployed model


class PostedResultsObject(Schema):
    """The answer to posted results: one look for each subject and step."""

    object: Literal["list"] = "list"
    data: list[LookObject]
    n_results: int  # that were recorded, or had been before


def show_result(shown: ShownResult) -> ResultObject:
    """A result as clients see it."""
    row = shown.row
    version = row.benchmark_version_id
    return ResultObject(
        id=public_id("evaluation", row.id),
        created_at=unix(row.created_at),
        measured_at=unix(row.measured_at),
        subject=ShownSubject(type=row.subject_type, id=shown.subject_id),
        benchmark=row.benchmark,
        benchmark_version_id=None if version is None else public_id("benchmark_version", version),
        metric=row.metric,
        value=row.value,
        stderr=row.stderr,
        n_samples=row.n_samples,
        step=row.step,
        branch=row.branch,
        purpose=row.purpose,
        source=row.source,
        paired=row.is_paired,
        items=(
            None
            if shown.items is None
            else [ResultItemObject.model_validate(item) for item in shown.items]
        ),
        subjects=(
            None
            if shown.subjects is None
            else [SubjectScoreObject.model_validate(found) for found in shown.subjects]
        ),
    )


def show_points(points: Points) -> PointsObject:
    """Points as clients see them."""
    ids = [public_id("evaluation", key) for key in points.ids]
    # Built as it is: the database has made every number, and there may be tens of thousands.
    return PointsObject.model_construct(
        steps=points.steps,
        values=points.values,
        measured_at=points.measured_at,
        has_more=points.has_more,
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
    )


def show_look(look: RecordedLook, results: list[ShownResult]) -> LookObject:
    """What became of posted results."""
    decision = look.decision
    return LookObject(
        results=[show_result(result) for result in results],
        monitors=list(look.monitored),
        verdict=None if look.reading is None else look.reading.verdict.value,
        message=None if look.reading is None else describe_reading(look.reading),
        reading=None if look.reading is None else look.reading.model_dump(mode="json"),
        decision=(
            None
            if decision is None
            else {
                "id": public_id("decision", decision.id),
                "action": decision.action,
                "code": decision.code,
                "reason": decision.reason,
                "state": decision.state,
            }
        ),
    )
