"""Monitors and their looks."""

from typing import Any, Literal

from app.api.schemas.base import Identified, unix, unix_or_none
from app.db.models import MonitorLook
from app.domain.decisions import Reading
from app.domain.identifiers import public_id
from app.domain.monitors import MonitoredBenchmark, MonitorLimits, OnRegression, Schedule
from app.domain.wording import describe_reading
from app.services.deployed import alias_name
from app.services.monitors import ShownMonitor


class MonitorObject(Identified):
    """Watches what an alias points at.

    `status` is the verdict of the latest look at the present version, `waiting` before the first, and `stale`
    when nothing fresh was heard for longer than `stale_after_hours`.
    """

    object: Literal["monitor"] = "monitor"
    created_at: int
    updated_at: int
    model: str
    version: int | None
    points_at: str | None
    benchmarks: list[MonitoredBenchmark]
    limits: MonitorLimits
    sources: list[str]
    schedule: Schedule | None
    stale_after_hours: float | None
    on_regression: OnRegression
    enabled: bool
    status: str
    last_result_at: int | None
    stale_since: int | None
    next_evaluation_at: int | None
    evaluation_job_id: str | None


class MonitorLookObject(Identified):
    """One look of a monitor: the reading, and what it led to."""

    object: Literal["monitor.look"] = "monitor.look"
    created_at: int
    measured_at: int
    model: str
    source: str
    look: int
    alpha: float
    verdict: str
    message: str
    reading: dict[str, Any]
    result_ids: list[str]
    alias_change_id: str | None
    outcome: dict[str, Any]


def show_monitor(shown: ShownMonitor) -> MonitorObject:
    """A monitor as clients see it."""
    monitor = shown.row.monitor
    status = "waiting" if shown.look is None else shown.look.verdict
    job = monitor.evaluation_job_id
    return MonitorObject(
        id=public_id("monitor", monitor.id),
        created_at=unix(monitor.created_at),
        updated_at=unix(monitor.updated_at),
        model=alias_name(shown.row),
        version=shown.version,
        points_at=None if shown.model is None else shown.model.name,
        benchmarks=list(shown.settings.benchmarks),
        limits=shown.settings.limits,
        sources=monitor.sources,
        schedule=shown.settings.schedule,
        stale_after_hours=monitor.stale_after_hours,
        on_regression=shown.settings.on_regression,
        enabled=monitor.enabled,
        status=status if monitor.stale_since is None else "stale",
        last_result_at=unix_or_none(monitor.last_result_at),
        stale_since=unix_or_none(monitor.stale_since),
        next_evaluation_at=unix_or_none(monitor.next_evaluation_at),
        evaluation_job_id=None if job is None else public_id("evaluation_job", job),
    )


def show_look(look: MonitorLook, model: str) -> MonitorLookObject:
    """A look as clients see it."""
    change = look.alias_change_id
    return MonitorLookObject(
        id=public_id("monitor_look", look.id),
        created_at=unix(look.created_at),
        measured_at=unix(look.measured_at),
        model=model,
        source=look.source,
        look=look.look,
        alpha=look.alpha,
        verdict=look.verdict,
        message=describe_reading(Reading.model_validate(look.reading)),
        reading=look.reading,
        result_ids=[f"eval_{key}" for key in look.evaluation_ids],
        alias_change_id=None if change is None else public_id("alias_change", change),
        outcome=look.outcome,
    )
