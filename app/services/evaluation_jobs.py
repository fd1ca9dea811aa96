"""Evaluation jobs: what a monitor's schedule has a worker measure, and the verdict on it."""

from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Evaluation, Job, ModelVersion, Monitor
from app.db.repositories.benchmarks import BenchmarkRepository
from app.db.repositories.deployment import DeploymentRepository
from app.db.repositories.history import HistoryRepository
from app.db.repositories.monitors import MonitorRepository, MonitorRow
from app.db.repositories.project_jobs import ProjectJobRepository
from app.domain.identifiers import parse_id, public_id
from app.domain.messages import EvaluationFinished
from app.domain.monitors import SCHEDULE, EvaluationSpec, MonitorOutcome, MonitorSettings
from app.domain.runplan import EvaluationPlan
from app.domain.spec import JobSpec
from app.domain.states import JobKind, JobState
from app.errors import TrainingFailed
from app.services.deployed import Evidence, complete, judge, watch_of
from app.services.engine import end_lease, hold
from app.services.evaluations import (
    fill_scores,
    merge_baseline,
    row_id,
    sense_scores,
    unpack_scores,
)
from app.services.events import add_job_event, add_transition
from app.services.runs import (
    Prepared,
    benchmark_input,
    choose_threads,
    prepare_run,
    without_baselines,
)
from app.services.scratch import Input, Scratch, start_input
from app.services.watched import Watched
from app.settings import Settings

MAX_QUEUED = 100  # jobs of a project that may wait when a compensation job is to join them
PRIORITY = 50  # a deployed model goes before what is still to be trained


def queue_evaluation(
    session: Session, monitor: Monitor, settings: MonitorSettings, model: ModelVersion
) -> Job:
    """Asks a worker to score what an alias points at on what its monitor watches."""
    jobs = ProjectJobRepository(session)
    source = session.get_one(Job, model.job_id)
    job = Job(
        project_id=monitor.project_id,
        kind=JobKind.EVALUATION,
        state=JobState.QUEUED,
        spec=EvaluationSpec(
            monitor_id=public_id("monitor", monitor.id),
            model_version_id=model.id.hex,
            benchmarks=settings.benchmarks,
        ).model_dump(mode="json"),
        base_model_id=model.base_model_id,
        queue=source.queue,
        priority=PRIORITY,
        model_version_id=model.id,
    )
    jobs.add(job)
    jobs.ring_later(job)
    add_transition(session, job, JobState.QUEUED, f"{model.name} is to be evaluated.")
    return job


def prepare_attempt(session: Session, job_id: UUID, attempt: int, settings: Settings) -> Prepared:
    """Plans an attempt at a job of any kind and keeps the plan with it.

    Raises:
        Fenced: The attempt no longer holds the job.
        TrainingFailed: It cannot be run: something it needs is gone.
    """
    job = hold(session, job_id, attempt)
    if job.kind is not JobKind.EVALUATION:
        return prepare_run(session, job_id, attempt, settings)
    return build_evaluation_plan(
        session, job, settings, Scratch(settings.scratch_root, job_id, attempt)
    )


def build_evaluation_plan(
    session: Session, job: Job, settings: Settings, scratch: Scratch
) -> Prepared:
    """An evaluation attempt: a published version on the benchmarks of its monitor.

    Raises:
        TrainingFailed: The version or a benchmark is gone.
    """
    spec = EvaluationSpec.model_validate(job.spec)
    model = session.get_one(ModelVersion, UUID(spec.model_version_id))
    if model.deleted_at is not None or model.path is None or model.sha256 is None:
        raise TrainingFailed(f"The model '{model.name}' is gone.", None, "model_not_found")
    base, base_files, _ = start_input(session, job, scratch)
    artifact = Input(model.path, scratch.input(model.sha256), model.sha256, is_directory=True)
    inputs = [*base_files, artifact]
    benchmarks = []
    for wish in spec.benchmarks:
        named = BenchmarkRepository(session).find_reference(job.project_id, wish.name)
        if named is None:
            raise TrainingFailed(
                f"The benchmark '{wish.name}' is gone.", None, "benchmark_not_found"
            )
        watched = Watched(named, wish.weight, wish.max_drop)
        benchmarks.append(benchmark_input(session, watched, base, scratch, inputs))
    source = session.get_one(Job, model.job_id)
    plan = EvaluationPlan(
        job_id=public_id("evaluation_job", job.id),
        attempt=job.attempt,
        base=base,
        artifact_directory=str(artifact.local),
        artifact_kind="adapter" if model.kind == "adapter" else "full",
        training=JobSpec.model_validate(source.spec).training,
        benchmarks=tuple(benchmarks),
        threads=choose_threads(session, job, settings),
        scratch_directory=str(scratch.directory),
        cache_directory=str(scratch.cache),
    )
    job.run_plan = without_baselines(plan.model_dump(mode="json"))
    session.flush()
    return Prepared(plan, tuple(inputs), None, job.order_version)


def finish_evaluation(
    session: Session, job_id: UUID, attempt: int, message: EvaluationFinished
) -> JobState:
    """Keeps the scores, and has the monitor judge them if the alias still points at that version.

    Raises:
        Fenced: The attempt no longer holds the job.
    """
    job = hold(session, job_id, attempt)
    spec = EvaluationSpec.model_validate(job.spec)
    model = session.get_one(ModelVersion, UUID(spec.model_version_id))
    row = MonitorRepository(session).find_row(parse_id("monitor", spec.monitor_id))
    job.report = {"seconds": message.seconds}
    outcome = None if row is None else _judge(session, job, row, model, message)
    end_lease(job, JobState.SUCCEEDED)
    session.flush()
    if outcome is not None:
        job.report = job.report | {"monitor": outcome.model_dump(mode="json")}
        add_job_event(
            session,
            job,
            level="info",
            message=f"{outcome.alias}: {outcome.verdict or outcome.why}",
            data={"code": "monitor_look", "outcome": outcome.model_dump(mode="json")},
        )
    add_transition(session, job, job.state, f"{model.name} is evaluated.")
    return job.state


def _judge(
    session: Session, job: Job, row: MonitorRow, model: ModelVersion, message: EvaluationFinished
) -> MonitorOutcome | None:
    """The monitor's look; None where the alias has moved on meanwhile."""
    repository = MonitorRepository(session)
    DeploymentRepository(session).lock([row.registered.id])
    fresh = repository.find_row(row.monitor.id)
    base = session.get_one(BaseModel, model.base_model_id)
    watch = watch_of(session, job.project_id, base, row.monitor)
    known = HistoryRepository(session).list_versions(
        [row_id(found.benchmark_version_id) for found in (*message.scores, *message.baseline)]
    )
    names = {row_id(plan.benchmark_version_id): plan.name for plan in watch.benchmarks}
    for found in message.baseline:
        version = known[row_id(found.benchmark_version_id)]
        merge_baseline(
            session, watch.baseline_key, version, names.get(version.id, "unknown"), found
        )
    rows = []
    for found in message.scores:
        version = known[row_id(found.benchmark_version_id)]
        evaluation = Evaluation(
            project_id=job.project_id,
            subject_type="model",
            subject_key=model.name,
            model_version_id=model.id,
            benchmark_version_id=version.id,
            benchmark=names.get(version.id, "unknown"),
            metric=str(version.scorer),
            purpose="monitor",
            source="run",
        )
        fill_scores(evaluation, *unpack_scores(found, version))
        session.add(evaluation)
        rows.append(evaluation)
    session.flush()
    pointed = None if fresh is None else repository.pointed_at(fresh.alias)
    if fresh is None or pointed is None or pointed[1].id != model.id:
        return None
    sent = {row_id(found.benchmark_version_id) for found in message.scores}
    plans = [p for p in watch.general() if row_id(p.benchmark_version_id) in sent]
    evidence = Evidence(
        source=SCHEDULE,
        digest=f"job:{job.id.hex}",
        evaluations=tuple(rows),
        sensed=complete(session, watch, sense_scores(session, watch, message.scores, plans=plans)),
        measured_at=repository.now(),
        is_fresh=True,
    )
    return judge(session, fresh, model, evidence, max_queued=MAX_QUEUED)[1]
