"""Monitors: made, changed, read; and what the scheduler does for them."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db.models import (
    BaseModel,
    Job,
    ModelVersion,
    Monitor,
    MonitorLook,
)
from app.db.repositories.benchmarks import BenchmarkRepository
from app.db.repositories.deployment import DeploymentRepository
from app.db.repositories.monitors import MonitorRepository, MonitorRow
from app.domain.benchmarks import BenchmarkKind
from app.domain.identifiers import public_id
from app.domain.monitors import (
    CreateMonitor,
    MonitoredBenchmark,
    MonitorSettings,
    UpdateMonitor,
)
from app.errors import BadRequest, Conflict, NotFound
from app.services.deployed import tell_stale
from app.services.evaluation_jobs import queue_evaluation

MISSED_EVALUATIONS = 3  # after so many a scheduled monitor is stale, unless it says otherwise


class ShownMonitor(NamedTuple):
    """A monitor with what it watches now, and its latest look at that."""

    row: MonitorRow
    settings: MonitorSettings
    model: ModelVersion | None
    version: int | None
    look: MonitorLook | None


def create_monitor(session: Session, project_id: UUID, body: CreateMonitor) -> MonitorRow:
    """Watches what an alias points at, from now on and wherever it moves.

    Raises:
        NotFound: No such registered model, alias or benchmark.
        Conflict: The alias has a monitor.
        BadRequest: A benchmark is named twice or measures what is learned, or there is none to watch.
    """
    name, _, alias_name = body.model.partition("@")
    deployment = DeploymentRepository(session)
    registered = deployment.get(project_id, name, lock=True)
    alias = deployment.get_alias(registered, alias_name)
    repository = MonitorRepository(session)
    if repository.find_of_alias(alias.id) is not None:
        raise Conflict(
            f"model: '{body.model}' has a monitor; change that one.", "model", "monitor_exists"
        )
    pointed = repository.pointed_at(alias)
    base = None if pointed is None else session.get_one(BaseModel, pointed[1].base_model_id)
    settings = MonitorSettings(
        benchmarks=_pin(session, project_id, base, body.benchmarks),
        limits=body.limits,
        schedule=body.schedule,
        on_regression=body.on_regression,
    )
    monitor = Monitor(
        project_id=project_id,
        alias_id=alias.id,
        settings=settings.model_dump(mode="json"),
        sources=list(body.sources),
        enabled=body.enabled,
        stale_after_hours=_stale_after(body),
        next_evaluation_at=None if body.schedule is None else func.clock_timestamp(),
    )
    repository.add(monitor)
    return MonitorRow(monitor, alias, registered)


def update_monitor(
    session: Session, project_id: UUID, monitor_id: UUID, body: UpdateMonitor
) -> MonitorRow:
    """Changes what is given; a new schedule begins with an evaluation at once.

    Raises:
        NotFound: The project has no such monitor, or sees no such benchmark.
        BadRequest: As for a new one; or nothing would be left to hear from.
    """
    repository = MonitorRepository(session)
    row = repository.get(project_id, monitor_id, for_update=True)
    monitor = row.monitor
    settings = MonitorSettings.model_validate(monitor.settings)
    given = body.model_fields_set
    changes: dict[str, Any] = {
        field: getattr(body, field)
        for field in ("limits", "schedule", "on_regression")
        if field in given
    }
    if "benchmarks" in given:
        pointed = repository.pointed_at(row.alias)
        base = None if pointed is None else session.get_one(BaseModel, pointed[1].base_model_id)
        changes["benchmarks"] = _pin(session, project_id, base, body.benchmarks)
    settings = settings.model_copy(update=changes)
    if "sources" in given:
        monitor.sources = list(body.sources)
    if not monitor.sources and settings.schedule is None:
        raise BadRequest("sources: name who may post results, or give a schedule.", "sources")
    if "stale_after_hours" in given:
        monitor.stale_after_hours, monitor.stale_since = body.stale_after_hours, None
    if "enabled" in given:
        monitor.enabled = body.enabled
    if "schedule" in given:
        monitor.next_evaluation_at = None if body.schedule is None else func.clock_timestamp()
    monitor.settings = settings.model_dump(mode="json")
    monitor.updated_at = func.clock_timestamp()
    session.flush()
    session.refresh(monitor)
    return row


def delete_monitor(session: Session, project_id: UUID, monitor_id: UUID) -> None:
    """Ends a monitor; its looks stay.

    Raises:
        NotFound: The project has no such monitor.
    """
    row = MonitorRepository(session).get(project_id, monitor_id, for_update=True)
    row.monitor.deleted_at = func.clock_timestamp()
    session.flush()


def get_monitor(session: Session, project_id: UUID, monitor_id: UUID) -> ShownMonitor:
    """One monitor.

    Raises:
        NotFound: The project has none of this id.
    """
    return show_monitor(session, MonitorRepository(session).get(project_id, monitor_id))


def list_monitors(
    session: Session, project_id: UUID, *, after: UUID | None, limit: int
) -> tuple[list[ShownMonitor], bool]:
    """A page of monitors, newest first, and whether there are more.

    Raises:
        NotFound: The project has no monitor `after`.
    """
    repository = MonitorRepository(session)
    last = None if after is None else repository.get(project_id, after).monitor
    found = repository.list_page(project_id, after=last, limit=limit + 1)
    return [show_monitor(session, row) for row in found[:limit]], len(found) > limit


def list_looks(
    session: Session, project_id: UUID, monitor_id: UUID, *, after: UUID | None, limit: int
) -> tuple[list[tuple[MonitorLook, str]], bool]:
    """A page of a monitor's looks with the models' names, newest first, and whether there are more.

    Raises:
        NotFound: The project has no such monitor, or the monitor no look `after`.
    """
    repository = MonitorRepository(session)
    monitor = repository.get(project_id, monitor_id).monitor
    found = repository.list_looks(monitor, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit


def show_monitor(session: Session, row: MonitorRow) -> ShownMonitor:
    """A monitor with what it watches now."""
    repository = MonitorRepository(session)
    pointed = repository.pointed_at(row.alias)
    return ShownMonitor(
        row,
        MonitorSettings.model_validate(row.monitor.settings),
        None if pointed is None else pointed[1],
        None if pointed is None else pointed[0].version,
        repository.latest_look(row.alias),
    )


def start_due_evaluations(session: Session) -> list[Job]:
    """Queues an evaluation for every monitor whose time has come and whose last one has ended."""
    repository = MonitorRepository(session)
    jobs = []
    for row in repository.lock_due():
        settings = MonitorSettings.model_validate(row.monitor.settings)
        pointed = repository.pointed_at(row.alias)
        if settings.schedule is None or pointed is None or pointed[1].status != "ready":
            continue
        job = queue_evaluation(session, row.monitor, settings, pointed[1])
        row.monitor.evaluation_job_id = job.id
        repository.put_off(row.monitor, settings.schedule.every_hours)
        jobs.append(job)
    return jobs


def tell_silent(session: Session) -> list[str]:
    """Tells of every monitor that has heard nothing for longer than it allows; once a silence."""
    rows = MonitorRepository(session).lock_silent()
    for row in rows:
        tell_stale(session, row, "silence")
    return [public_id("monitor", row.monitor.id) for row in rows]


def _stale_after(body: CreateMonitor) -> float | None:
    """What was asked for; a schedule whose evaluations keep failing must not go unnoticed for want of a word."""
    if body.schedule is None or "stale_after_hours" in body.model_fields_set:
        return body.stale_after_hours
    return MISSED_EVALUATIONS * body.schedule.every_hours


def _pin(
    session: Session,
    project_id: UUID,
    base: BaseModel | None,
    wanted: Sequence[MonitoredBenchmark] | None,
) -> tuple[MonitoredBenchmark, ...]:
    """What is watched, each pinned to its version: what is named, else the base's suite of general benchmarks."""
    repository = BenchmarkRepository(session)
    if wanted is None:
        suite = [] if base is None else repository.list_suite(base.id)
        found = [
            MonitoredBenchmark(name=entry.benchmark.reference, weight=entry.weight)
            for entry in suite
            if entry.benchmark.version.kind is BenchmarkKind.GENERAL
        ]
        if not found:
            raise BadRequest(
                "benchmarks: name what is to be watched; the base model has no suite.",
                "benchmarks",
                "nothing_to_watch",
            )
        return tuple(found)
    pinned: list[MonitoredBenchmark] = []
    for place, wish in enumerate(wanted):
        path = f"benchmarks.{place}.name"
        named = repository.find_reference(project_id, wish.name)
        if named is None:
            raise NotFound(
                f"{path}: no benchmark is called '{wish.name}'.", path, "benchmark_not_found"
            )
        if named.version.kind is not BenchmarkKind.GENERAL:
            raise BadRequest(f"{path}: '{wish.name}' measures what is learned.", path)
        if any(other.name == named.reference for other in pinned):
            raise BadRequest(f"{path}: '{wish.name}' is named twice.", path)
        pinned.append(wish.model_copy(update={"name": named.reference}))
    return tuple(pinned)
