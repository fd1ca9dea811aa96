"""What early stopping is told of the benchmark it watches, wherever scores come in."""

from collections.abc import Sequence

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import Evaluation, Job
from app.db.repositories.history import HistoryRepository
from app.domain.benchmarks import BenchmarkScores
from app.domain.decisions import MetricFact
from app.domain.results import METRICS, UNNAMED
from app.domain.runplan import BenchmarkPlan
from app.domain.stopping import find_metric, read_metric
from app.services.evaluations import Watch, row_id, unpack_bytes, unpack_scores


def metric_plan(watch: Watch) -> BenchmarkPlan | None:
    """The benchmark that early stopping watches; None: the validation loss."""
    plans = {plan.name: plan for plan in watch.benchmarks}
    names = find_metric(watch.policy, tuple(plans))
    return plans[names[0]] if names else None


def metric_of(watch: Watch, scores: Sequence[BenchmarkScores]) -> MetricFact | None:
    """The watched benchmark's value at a run's own evaluation point; None where it wasn't measured."""
    plan = metric_plan(watch)
    if plan is None:
        return None
    version_id = row_id(plan.benchmark_version_id)
    for found in scores:
        if row_id(found.benchmark_version_id) == version_id:
            values, tokens = unpack_scores(found, watch.versions[version_id])
            return read_metric(plan.name, plan.scorer, values, tokens)
    return None


def posted_metric(
    session: Session, job: Job, watch: Watch, rows: Sequence[Evaluation]
) -> MetricFact | None:
    """The watched benchmark's value by results from outside, over the items on which the job measures itself.

    None where those items weren't all posted, or the job has not measured itself yet: values over other items
    would differ by their difficulty, and patience would count that.
    """
    plan = metric_plan(watch)
    if plan is None:
        return None
    version_id = row_id(plan.benchmark_version_id)
    names = {UNNAMED, *METRICS[plan.scorer]}
    posted = next(
        (
            row
            for row in rows
            if row.benchmark_version_id == version_id and row.scores and row.metric in names
        ),
        None,
    )
    own = HistoryRepository(session).find_latest_gate(job.id, version_id)
    if posted is None or posted.scores is None or own is None or own.scores is None:
        return None
    values, measured = unpack_bytes(posted.scores), ~np.isnan(unpack_bytes(own.scores))
    if np.isnan(values[measured]).any():
        return None
    values = np.where(measured, values, np.nan).astype(np.float32)
    tokens = None if posted.tokens is None else unpack_bytes(posted.tokens)
    return read_metric(plan.name, plan.scorer, values, tokens)
