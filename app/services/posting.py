"""Results as they are posted: those of deployed models go to their monitors, all others to their job."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Evaluation, ModelVersion, MonitorLook
from app.db.repositories.deployment import DeploymentRepository
from app.db.repositories.keys import KeyRepository
from app.db.repositories.lineage import LineageRepository
from app.db.repositories.monitors import MonitorRepository, MonitorRow
from app.domain.decisions import Reading
from app.domain.monitors import MonitorOutcome, digest_results, is_too_old
from app.domain.results import METRICS, PostedResult, PostedResults
from app.domain.runplan import BenchmarkPlan
from app.domain.scopes import Caller, Scope
from app.domain.sensing import SensedBenchmark, Summary
from app.errors import Conflict, NotFound
from app.services.deployed import Evidence, complete, heard, judge, outcome_of, watch_of
from app.services.evaluations import Watch, fill_scores, row_id, sense, unpack_bytes
from app.services.posted import align_items, check_range, summarise, value_of
from app.services.registered_models import find_by_reference
from app.services.results import RecordedLook, record_results
from app.services.storage import Storage


@dataclass(frozen=True, slots=True)
class _Group:
    """Results of one deployed model, step and source."""

    model: ModelVersion
    source: str
    results: tuple[PostedResult, ...]
    max_queued: int

    @property
    def digest(self) -> str:
        """The same for results that are posted again."""
        return digest_results(self.model.name, self.source, self.results)


@dataclass(frozen=True, slots=True)
class _Read:
    """A posted result as a row, with what can be compared of it."""

    row: Evaluation
    version_id: UUID | None
    summary: Summary | None


def post_results(
    session: Session,
    storage: Storage,
    caller: Caller,
    body: PostedResults,
    *,
    max_queued: int = 100,
) -> list[RecordedLook]:
    """Records posted results; those of one subject, step and source make one look.

    A deployed model may be named by its alias. What its monitors make of the results, they do in this very
    transaction. Results that were posted before give the look that they made then.

    Raises:
        Forbidden: The key may not post results.
        NotFound: No such job, model or alias in the caller's project.
        Conflict: A suite hash unlike the baseline's.
        BadRequest: An accuracy outside 0 to 1.
    """
    caller.require(Scope.RESULTS_WRITE)
    models = _find_models(session, caller, body.results)
    known = _find_monitored(session, models)
    groups: dict[tuple[str, int, str], list[PostedResult]] = {}
    rest: list[PostedResult] = []
    for result in body.results:
        model = models.get(result.subject.id) if result.subject.type == "model" else None
        if model is None or (model.id not in known and model.name == result.subject.id):
            rest.append(result)
        elif model.id not in known:
            subject = result.subject.model_copy(update={"id": model.name})
            rest.append(result.model_copy(update={"subject": subject}))
        else:
            source = result.source or _key_name(session, caller)
            step = -1 if result.step is None else result.step
            groups.setdefault((model.name, step, source), []).append(result)
    by_name = {model.name: model for model in models.values()}
    looks = []
    for (name, _, source), results in sorted(groups.items(), key=lambda group: group[0]):
        group = _Group(by_name[name], source, tuple(results), max_queued)
        look = _record_group(session, storage, caller, group)
        looks += [] if look is None else [look]
        rest += results if look is None else []
    if rest:
        others = PostedResults(results=tuple(rest))
        looks += record_results(session, storage, caller, others)
    return looks


def _find_models(
    session: Session, caller: Caller, results: Sequence[PostedResult]
) -> dict[str, ModelVersion]:
    """The model versions behind the subjects' names, which may be `name@alias`.

    Raises:
        NotFound: One of them is none of the project's.
    """
    names = {result.subject.id for result in results if result.subject.type == "model"}
    found = LineageRepository(session).find_live(caller.project_id, names)
    for name in names - found.keys():
        model = find_by_reference(session, caller.project_id, name)
        if model is None:
            raise NotFound(f"No model is called '{name[:80]}'.", "subject.id")
        found[name] = model
    return found


def _find_monitored(session: Session, models: dict[str, ModelVersion]) -> set[UUID]:
    """Models that a monitor watches or once looked at; what can move their aliases is locked, in one order."""
    ids = [model.id for model in models.values()]
    repository = MonitorRepository(session)
    watching = repository.list_watching(ids)
    if watching:
        DeploymentRepository(session).lock([row.registered.id for _, row in watching])
    return {key for key, _ in watching} | repository.list_looked_at(ids)


def _record_group(
    session: Session, storage: Storage, caller: Caller, group: _Group
) -> RecordedLook | None:
    """What the monitors made of a group; None where there is neither a monitor any more nor a look of before."""
    repository = MonitorRepository(session)
    replayed = repository.list_replayed(group.model.id, group.digest)
    if replayed:
        return _replay(session, group, replayed)
    watching = [row for _, row in repository.list_watching([group.model.id])]
    if not watching:
        return None
    base = session.get_one(BaseModel, group.model.base_model_id)
    watches = [watch_of(session, caller.project_id, base, row.monitor) for row in watching]
    plans = [plan for watch in watches for plan in watch.general()]
    reads = [_read(session, storage, group, result, watches, plans) for result in group.results]
    readings, outcomes = [], []
    for row, watch in zip(watching, watches, strict=True):
        sensed = [found for read in reads for found in _sense(session, watch, read)]
        evidence = _weigh(session, caller, row, group, reads, complete(session, watch, sensed))
        reading, outcome = judge(session, row, group.model, evidence, max_queued=group.max_queued)
        readings.append(reading)
        outcomes.append(outcome)
    rows = tuple(read.row for read in reads)
    return RecordedLook(rows, readings[0], None, tuple(outcomes))


def _replay(session: Session, group: _Group, looks: Sequence[MonitorLook]) -> RecordedLook:
    """The looks that the same results made before; that they came again says that the evaluator is alive."""
    repository = MonitorRepository(session)
    outcomes: list[MonitorOutcome] = []
    for look in looks:
        row = repository.find_row(look.monitor_id)
        if row is None:
            continue
        pointed = repository.pointed_at(row.alias)
        if pointed is not None and pointed[1].id == group.model.id:
            heard(row.monitor, _measured_at(session, group))
        outcomes.append(outcome_of(row, look, is_replay=True))
    session.flush()
    ids = [UUID(key) for key in looks[0].evaluation_ids]
    rows = LineageRepository(session).list_evaluations(ids)
    return RecordedLook(tuple(rows), _reading_of(looks[0]), None, tuple(outcomes))


def _read(
    session: Session,
    storage: Storage,
    group: _Group,
    result: PostedResult,
    watches: Sequence[Watch],
    plans: Sequence[BenchmarkPlan],
) -> _Read:
    """Writes a result's row, its items in the order of the benchmark where a monitor watches it."""
    row = Evaluation(
        project_id=group.model.project_id,
        subject_type="model",
        subject_key=group.model.name,
        model_version_id=group.model.id,
        benchmark=result.benchmark,
        metric=result.metric or "value",
        purpose="monitor",
        source="external",
        step=result.step,
        value=value_of(result),
        stderr=result.stderr,
        n_samples=result.n_samples if result.items is None else len(result.items),
        is_paired=result.items is not None,
    )
    if result.measured_at is not None:
        row.measured_at = result.measured_at
    session.add(row)
    found = _find_plan(watches, plans, result.benchmark)
    if found is None:
        session.flush()
        return _Read(row, None, None)
    watch, plan = found
    version = watch.versions[row_id(plan.benchmark_version_id)]
    if result.suite_sha256 not in {None, version.items_sha256}:
        raise Conflict(
            f"suite_sha256: the baseline of '{result.benchmark}' was measured on {version.items_sha256}.",
            "suite_sha256",
            "suite_mismatch",
        )
    check_range(result, plan.scorer)
    row.benchmark_version_id = version.id
    values = align_items(session, storage, version, result)
    summary = None
    if values is None:
        row.is_paired = False
        summary = summarise(result, plan.scorer)
    else:
        reference = sense(session, watch, plan, None, None)
        fill_scores(row, values, reference.baseline_tokens)
    session.flush()
    is_comparable = result.metric is None or result.metric in METRICS[plan.scorer]
    return _Read(row, version.id if is_comparable else None, summary)


def _find_plan(
    watches: Sequence[Watch], plans: Sequence[BenchmarkPlan], benchmark: str
) -> tuple[Watch, BenchmarkPlan] | None:
    """The watched benchmark behind `name` or `name@version`, of the first monitor that watches it."""
    for plan in plans:
        if benchmark in {plan.name, plan.name.partition("@")[0]}:
            watch = next(w for w in watches if row_id(plan.benchmark_version_id) in w.versions)
            return watch, plan
    return None


def _sense(session: Session, watch: Watch, read: _Read) -> list[SensedBenchmark]:
    for plan in watch.general():
        if row_id(plan.benchmark_version_id) == read.version_id:
            if read.row.scores is not None:
                return [sense(session, watch, plan, unpack_bytes(read.row.scores), None)]
            if read.summary is not None:
                return [sense(session, watch, plan, None, None, read.summary)]
    return []


def _weigh(
    session: Session,
    caller: Caller,
    row: MonitorRow,
    group: _Group,
    reads: Sequence[_Read],
    sensed: tuple[SensedBenchmark, ...],
) -> Evidence:
    """The group as one monitor's evidence: whether it is fresh, and whether it may act."""
    monitor = row.monitor
    now = MonitorRepository(session).now()
    objection = None
    if Scope.RESULTS_ACT not in caller.scopes:
        objection = f"the key lacks the scope '{Scope.RESULTS_ACT.value}'"
    elif group.source not in monitor.sources:
        objection = f"'{group.source}' is no source of the monitor"
    oldest = min((r.measured_at for r in group.results if r.measured_at is not None), default=None)
    return Evidence(
        source=group.source,
        digest=group.digest,
        evaluations=tuple(read.row for read in reads),
        sensed=sensed,
        measured_at=_measured_at(session, group),
        is_fresh=not is_too_old(oldest, now, monitor.stale_after_hours),
        objection=objection,
    )


def _measured_at(session: Session, group: _Group) -> datetime:
    """When the oldest of the results was measured, and never in the future."""
    now = MonitorRepository(session).now()
    return min([now, *(r.measured_at for r in group.results if r.measured_at is not None)])


def _reading_of(look: MonitorLook) -> Reading:
    return Reading.model_validate(look.reading)


def _key_name(session: Session, caller: Caller) -> str:
    """The name of the caller's key, by which an evaluator that names no source is known."""
    row = KeyRepository(session).find_live(caller.key_id)
    return caller.key_id if row is None else row.name
