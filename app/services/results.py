"""Results from outside: recorded, read by the sensor as the run's own are, and acted on with the scope for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.db.models import (
    DecisionRow,
    Evaluation,
    Job,
    ModelVersion,
)
from app.db.repositories.history import HistoryRepository
from app.domain.benchmarks import BenchmarkKind
from app.domain.decisions import Action, Look, Reading, Verdict
from app.domain.identifiers import parse_id
from app.domain.monitors import MonitorOutcome
from app.domain.results import METRICS, UNNAMED, PostedResult, PostedResults
from app.domain.runplan import BenchmarkPlan
from app.domain.scopes import Caller, Scope
from app.domain.sensing import SensedBenchmark, read_sensor
from app.domain.states import JobState
from app.errors import Conflict, NotFound
from app.services.decisions import apply_decision, in_force, list_facts
from app.services.early_stopping import metric_plan, posted_metric
from app.services.evaluations import Watch, fill_scores, load_watch, row_id, sense
from app.services.orders import give_order
from app.services.posted import align_items, check_range, summarise, value_of
from app.services.results_query import ResultRow
from app.services.storage import Storage
from app.services.unwatched import LookKey, record_unwatched


@dataclass(frozen=True, slots=True)
class RecordedLook:
    """What became of the results of one subject and step."""

    evaluations: tuple[ResultRow, ...]
    reading: Reading | None  # None: nothing watched was posted
    decision: DecisionRow | None  # None: recorded only
    monitored: tuple[MonitorOutcome, ...] = ()  # of a deployed model's monitors

    @property
    def is_plain(self) -> bool:
        """Nothing was made of it."""
        return self.reading is None and self.decision is None and not self.monitored


@dataclass(frozen=True, slots=True)
class _Subject:
    """A job, or a model version with the job that made it; the job's row is locked."""

    type: str
    key: str
    job: Job
    model: ModelVersion | None
    watch: Watch | None

    def find_plan(self, benchmark: str) -> BenchmarkPlan | None:
        """The benchmark behind `name` or `name@version`, of the watched general ones and early stopping's."""
        if self.watch is None:
            return None
        stopping = metric_plan(self.watch)
        for plan in [*self.watch.general(), *([] if stopping is None else [stopping])]:
            name = plan.name.partition("@")[0]
            version = self.watch.versions[row_id(plan.benchmark_version_id)].version
            if benchmark in {name, f"{name}@{version}"}:
                return plan
        return None


def record_results(
    session: Session, storage: Storage, caller: Caller, body: PostedResults
) -> list[RecordedLook]:
    """Records posted results; those of one subject and step make one look of the sensor.

    On a running job a look is decided on as the trainer's own are, and what is decided becomes an order that
    the trainer applies before its next step: given the scope `results:act`, and only on results with a
    number of samples. The mean of the look is over the benchmarks that were posted.

    Raises:
        Forbidden: The key may not post results.
        NotFound: No such job or model in the caller's project.
        Conflict: A suite hash unlike the baseline's.
        BadRequest: An accuracy outside 0 to 1.
    """
    caller.require(Scope.RESULTS_WRITE)
    groups: dict[LookKey, list[PostedResult]] = {}
    for result in body.results:
        key = (result.subject.type, result.subject.id, result.step)
        groups.setdefault(key, []).append(result)
    ordered = dict(sorted(groups.items(), key=lambda group: group[0][:2]))  # so locks are taken
    plain = record_unwatched(session, caller.project_id, ordered)
    return [
        RecordedLook(plain[key], None, None)
        if key in plain
        else _record_look(session, storage, caller, results)
        for key, results in ordered.items()
    ]


def _record_look(
    session: Session, storage: Storage, caller: Caller, results: Sequence[PostedResult]
) -> RecordedLook:
    subject = _find_subject(session, caller, results[0])
    evaluations: list[Evaluation] = []
    sensed: list[SensedBenchmark] = []
    for result in results:
        plan = subject.find_plan(result.benchmark)
        row, found = _record_result(session, storage, subject, result, plan)
        evaluations.append(row)
        sensed += [] if found is None else [found]
    session.flush()
    if not sensed or subject.watch is None:
        return RecordedLook(tuple(evaluations), None, None)
    history = HistoryRepository(session)
    looks = (
        history.count_looks(subject.job.id)
        if subject.model is None
        else history.count_monitor_looks(subject.key, evaluations[0].id)
    )
    reading = read_sensor(subject.watch.policy, sensed, look=looks + 1)
    may_act = (
        subject.model is None
        and subject.watch.is_watched
        and subject.job.state is JobState.RUNNING
        and Scope.RESULTS_ACT in caller.scopes
        and reading.verdict not in {Verdict.NO_DATA, Verdict.AT_FLOOR}
    )
    decision = _act(session, subject, reading, evaluations) if may_act else None
    return RecordedLook(tuple(evaluations), reading, decision)


def _find_subject(session: Session, caller: Caller, result: PostedResult) -> _Subject:
    """The subject in the caller's project; its job's row is locked, so looks are counted one by one."""
    history = HistoryRepository(session)
    model = None
    if result.subject.type == "model":
        model = history.find_model(caller.project_id, result.subject.id)
        if model is None:
            raise NotFound(f"No model is called '{result.subject.id[:80]}'.", "subject.id")
        job_id = model.job_id
    else:
        job_id = parse_id("job", result.subject.id, param="subject.id")
    job = history.lock_job(job_id)
    if job is None or job.project_id != caller.project_id:
        raise NotFound(f"No job has the id '{result.subject.id[:80]}'.", "subject.id")
    return _Subject(
        type=result.subject.type,
        key=str(job.id) if model is None else model.name,
        job=job,
        model=model,
        watch=None if job.run_plan is None else load_watch(session, job),
    )


def _record_result(
    session: Session,
    storage: Storage,
    subject: _Subject,
    result: PostedResult,
    plan: BenchmarkPlan | None,
) -> tuple[Evaluation, SensedBenchmark | None]:
    """Writes one result's row, and what the sensor takes of it: None where it can't be compared."""
    row = _build_row(subject, result)
    session.add(row)
    if plan is None or subject.watch is None:
        session.flush()
        return row, None
    version = subject.watch.versions[row_id(plan.benchmark_version_id)]
    if result.suite_sha256 not in {None, version.items_sha256}:
        raise Conflict(
            f"suite_sha256: the baseline of '{result.benchmark}' was measured on {version.items_sha256}.",
            "suite_sha256",
            "suite_mismatch",
        )
    check_range(result, plan.scorer)
    row.benchmark_version_id = version.id
    values = align_items(session, storage, version, result)
    if values is not None:
        reference = sense(session, subject.watch, plan, None, None)
        fill_scores(row, values, reference.baseline_tokens)
        found = sense(session, subject.watch, plan, values, None)
    else:
        row.is_paired = False
        summary = summarise(result, plan.scorer)
        found = sense(session, subject.watch, plan, None, None, summary)
    session.flush()
    is_comparable = result.metric is None or result.metric in METRICS[plan.scorer]
    is_read = is_comparable and (values is not None or found.summary is not None)
    return row, found if is_read and plan.kind is BenchmarkKind.GENERAL else None


def _build_row(subject: _Subject, result: PostedResult) -> Evaluation:
    row = Evaluation(
        project_id=subject.job.project_id,
        subject_type=subject.type,
        subject_key=subject.key,
        job_id=subject.job.id if subject.model is None else None,
        model_version_id=None if subject.model is None else subject.model.id,
        benchmark=result.benchmark,
        metric=result.metric or UNNAMED,
        purpose="monitor",
        source="external",
        branch=subject.job.branch if subject.model is None else None,
        step=result.step,
        value=value_of(result),
        stderr=result.stderr,
        n_samples=result.n_samples if result.items is None else len(result.items),
        is_paired=result.items is not None,
    )
    if result.measured_at is not None:
        row.measured_at = result.measured_at
    return row


def _act(
    session: Session, subject: _Subject, reading: Reading, evaluations: Sequence[Evaluation]
) -> DecisionRow:
    """Decides on the look, and gives the trainer an order where anything is to be done."""
    history, job, watch = HistoryRepository(session), subject.job, subject.watch
    branch, evaluation = job.branch, evaluations[0]
    if watch is None:
        raise Conflict("The job has not started yet.", "subject.id")
    look = Look(
        branch=branch,
        step=job.step if evaluation.step is None else evaluation.step,
        is_last=False,
        reading=reading,
        valid_loss=None,
        metric=posted_metric(session, job, watch, evaluations),
        repair_possible=False,  # an order changes coefficients and rolls back, it searches no weights
        checkpoints=list_facts(history, job),
    )
    row = apply_decision(session, job, watch.policy, look, origin=f"external:{evaluation.id}")
    if in_force(row).action is not Action.KEEP:
        give_order(session, job, row)
    return row
