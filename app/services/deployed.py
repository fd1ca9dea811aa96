"""A monitor's verdict on what an alias points at, and what follows: rollback, compensation, events."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Evaluation, ModelVersion, Monitor, MonitorLook
from app.db.repositories.benchmarks import BenchmarkRepository
from app.db.repositories.monitors import MonitorRepository, MonitorRow
from app.domain.decisions import Reading, Verdict
from app.domain.identifiers import public_id
from app.domain.monitors import MonitorOutcome, MonitorSettings, describe_outcome
from app.domain.sensing import SensedBenchmark, read_sensor
from app.domain.wording import describe_reading
from app.services.aliases import roll_back_regressed
from app.services.compensation import compensate
from app.services.evaluations import Watch, row_id, sense
from app.services.lineage import base_key
from app.services.watched import plan_benchmark
from app.services.webhooks import emit_event

SAYS_NOTHING = frozenset({Verdict.NO_DATA, Verdict.AT_FLOOR})


@dataclass(frozen=True, slots=True)
class Evidence:
    """Results that belong together, as a monitor judges them."""

    source: str
    digest: str
    evaluations: tuple[Evaluation, ...]
    sensed: tuple[SensedBenchmark, ...]
    measured_at: datetime  # not after now
    is_fresh: bool
    objection: str | None = None  # why it may not act


def watch_of(session: Session, project_id: UUID, base: BaseModel, monitor: Monitor) -> Watch:
    """What a monitor watches, against the baseline of a lineage's root."""
    settings = MonitorSettings.model_validate(monitor.settings)
    repository = BenchmarkRepository(session)
    plans, versions = [], {}
    for wish in settings.benchmarks:
        named = repository.find_reference(project_id, wish.name)
        if named is None:
            continue  # its project lost sight of it: unmeasured, and so never a pass
        versions[named.version.id] = named.version
        plans.append(plan_benchmark(named, weight=wish.weight, max_drop=wish.max_drop))
    return Watch(
        policy=settings.policy(),
        is_watched=True,
        baseline_key=base_key(base),
        benchmarks=tuple(plans),
        versions=versions,
        gate_items=None,
    )


def complete(
    session: Session, watch: Watch, sensed: Sequence[SensedBenchmark]
) -> tuple[SensedBenchmark, ...]:
    """What was measured, and what the monitor watches and nobody measured: that forbids a pass."""
    measured = {found.benchmark_version_id for found in sensed}
    missing = [
        sense(session, watch, plan, None, None)
        for plan in watch.general()
        if str(row_id(plan.benchmark_version_id)) not in measured
    ]
    return (*sensed, *missing)


def judge(
    session: Session, row: MonitorRow, model: ModelVersion, evidence: Evidence, *, max_queued: int
) -> tuple[Reading | None, MonitorOutcome]:
    """One look of a monitor; the caller holds the registered model's lock, and the alias points at the model.

    What may not act is read and not counted: nobody without the scope can spend an alias's error.
    """
    monitor = row.monitor
    if not evidence.is_fresh:
        tell_stale(session, row, "stale_data")
        return None, _outcome(row, None, why="the results are older than stale_after_hours")
    repository = MonitorRepository(session)
    settings = MonitorSettings.model_validate(monitor.settings)
    look = repository.count_looks(row.alias.id) + 1
    reading = read_sensor(settings.policy(), evidence.sensed, look=look)
    objection = evidence.objection
    if objection is None and not monitor.enabled:
        objection = "the monitor is off"
    if objection is None and reading.verdict in SAYS_NOTHING:
        objection = "nothing could be compared with the root's baseline"
    if objection is not None:
        return reading, _outcome(row, reading, why=objection)
    found = MonitorLook(
        monitor_id=monitor.id,
        alias_id=row.alias.id,
        model_version_id=model.id,
        digest=evidence.digest,
        source=evidence.source,
        evaluation_ids=[evaluation.id.hex for evaluation in evidence.evaluations],
        look=look,
        alpha=reading.alpha,
        verdict=reading.verdict.value,
        reading=reading.model_dump(mode="json"),
        measured_at=evidence.measured_at,
        outcome={},
    )
    repository.add(found)
    heard(monitor, evidence.measured_at)
    if reading.verdict is Verdict.REGRESS:
        found.outcome = _react(session, row, model, found, settings, max_queued=max_queued)
    session.flush()
    return reading, outcome_of(row, found)


def heard(monitor: Monitor, measured_at: datetime) -> None:
    """A result says how the model does: the silence is over."""
    if monitor.last_result_at is None or monitor.last_result_at < measured_at:
        monitor.last_result_at = measured_at
    monitor.stale_since = None


def tell_stale(session: Session, row: MonitorRow, reason: str) -> None:
    """Says once that a monitor is in the dark; the next fresh result ends that."""
    monitor = row.monitor
    if monitor.stale_since is not None:
        return
    repository = MonitorRepository(session)
    pointed = repository.pointed_at(row.alias)
    repository.mark_stale(monitor)
    emit_event(
        session,
        project_id=monitor.project_id,
        type="monitor.stale",
        data={
            "id": public_id("monitor", monitor.id),
            "alias": alias_name(row),
            "model": None if pointed is None else pointed[1].name,
            "reason": reason,
            "stale_after_hours": monitor.stale_after_hours,
            "last_result_at": (
                None if monitor.last_result_at is None else monitor.last_result_at.isoformat()
            ),
        },
    )


def outcome_of(row: MonitorRow, look: MonitorLook, *, is_replay: bool = False) -> MonitorOutcome:
    """What a recorded look led to."""
    return MonitorOutcome(
        monitor_id=public_id("monitor", look.monitor_id),
        alias=alias_name(row),
        verdict=look.verdict,
        look=look.look,
        acted=True,
        is_replay=is_replay,
        why=look.outcome.get("not_rolled_back") or look.outcome.get("not_compensated"),
        rolled_back_to=look.outcome.get("rolled_back_to"),
        compensation_job_id=look.outcome.get("compensation_job_id"),
    )


def alias_name(row: MonitorRow) -> str:
    """`name@alias`."""
    return f"{row.registered.name}@{row.alias.name}"


def _outcome(row: MonitorRow, reading: Reading | None, *, why: str) -> MonitorOutcome:
    return MonitorOutcome(
        monitor_id=public_id("monitor", row.monitor.id),
        alias=alias_name(row),
        verdict=None if reading is None else reading.verdict.value,
        look=None,
        acted=False,
        why=why,
    )


def _react(
    session: Session,
    row: MonitorRow,
    model: ModelVersion,
    look: MonitorLook,
    settings: MonitorSettings,
    *,
    max_queued: int,
) -> dict[str, Any]:
    """What a confirmed regression leads to, all in the transaction of the result."""
    monitor = row.monitor
    reading = Reading.model_validate(look.reading)
    outcome: dict[str, Any] = {"rolled_back_to": None, "compensation_job_id": None}
    job_id = None
    if settings.on_regression.compensate:
        made = compensate(session, monitor, model, settings, max_queued=max_queued)
        job_id = made.job_id
        outcome["not_compensated"] = made.problem
        if job_id is not None:
            outcome["compensation_job_id"] = public_id("job", job_id)
    else:
        outcome["not_compensated"] = "the monitor asks for none"
    if settings.on_regression.roll_back:
        change = roll_back_regressed(
            session,
            row.registered,
            row.alias,
            actor=public_id("monitor", monitor.id),
            reason=describe_reading(reading),
            details={
                "look_id": public_id("monitor_look", look.id),
                "source": look.source,
                "reading": look.reading,
            },
            compensation_job_id=job_id,
        )
        if change is None:
            outcome["not_rolled_back"] = "there is no good version to go back to"
        else:
            look.alias_change_id = change.id
            pointed = MonitorRepository(session).pointed_at(row.alias)
            outcome["rolled_back_to"] = None if pointed is None else pointed[0].version
    else:
        outcome["not_rolled_back"] = "the monitor asks for none"
    _tell_regression(session, row, model, look, outcome)
    return outcome


def _tell_regression(
    session: Session,
    row: MonitorRow,
    model: ModelVersion,
    look: MonitorLook,
    outcome: dict[str, Any],
) -> None:
    monitor = row.monitor
    reading = Reading.model_validate(look.reading)
    about = {
        "id": public_id("monitor", monitor.id),
        "alias": alias_name(row),
        "model": model.name,
        "look_id": public_id("monitor_look", look.id),
    }
    told = about | {
        "source": look.source,
        "look": look.look,
        "verdict": look.verdict,
        "drop": reading.drop,
        "lower": reading.lower,
        "upper": reading.upper,
        "max_drop": reading.limit,
        "benchmarks": [found.model_dump(mode="json") for found in reading.benchmarks],
        "message": f"{describe_reading(reading)} {describe_outcome(outcome)}.",
        **outcome,
    }
    emit_event(
        session, project_id=monitor.project_id, type="monitor.regression_detected", data=told
    )
    asked = MonitorSettings.model_validate(monitor.settings).on_regression.compensate
    if asked and outcome["compensation_job_id"] is None:
        emit_event(
            session,
            project_id=monitor.project_id,
            type="monitor.compensation_failed",
            data=about | {"message": outcome["not_compensated"]},
        )
