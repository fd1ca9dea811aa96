"""Runs that are trained elsewhere: registered, listed, steered by decisions they fetch, and ended."""

from uuid import UUID

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db.models import BaseModel, DecisionRow, Job, JobOrder
from app.db.repositories.catalog import CatalogRepository
from app.db.repositories.external_runs import ExternalRunRepository
from app.db.repositories.history import HistoryRepository
from app.db.repositories.project_jobs import ProjectJobRepository
from app.domain.external import Acknowledge, CreateRun, FinishRun, RunSpec, check_levers
from app.domain.identifiers import PREFIXES, parse_id
from app.domain.policy import Policy
from app.domain.runplan import BasePlan, BenchmarkPlan
from app.domain.states import JobKind, JobState
from app.errors import BadRequest, Conflict, NotFound, QuotaExceeded, RetainError
from app.services.evaluations import Watch, baseline_key, row_id
from app.services.events import Level, add_transition
from app.services.monitoring import refresh_power
from app.services.watched import Watched, pin_metric, plan_benchmark, resolve_watched, tighten

MAX_RUNNING = 1000  # a project; a run that nobody ends is followed for ever
_POLICY_PATH = "retention.policy"  # where a job's policy stands


def register_run(
    session: Session, project_id: UUID, body: CreateRun, *, max_running: int = MAX_RUNNING
) -> Job:
    """Registers a training that Retain does not execute.

    Raises:
        NotFound: A benchmark, or the run whose baseline is to be used, is unknown.
        BadRequest: Nothing is watched, a lever is wrong, or a baseline is not known; `param` names it.
        QuotaExceeded: The project has too many runs that nobody ended.
    """
    repository = ExternalRunRepository(session)
    if repository.count_running(project_id) >= max_running:
        raise QuotaExceeded(
            f"The project has {max_running} running external runs; finish some.",
            None,
            "too_many_runs",
        )
    base = CatalogRepository(session).find_model(body.model)
    policy = _policy(session, project_id, body)
    check_levers(body.levers, policy)
    watched, policy = _watched(session, project_id, base, policy, is_default=body.policy is None)
    run = Job(
        project_id=project_id,
        kind=JobKind.EXTERNAL,
        state=JobState.RUNNING,
        spec={},
        base_model_id=None if base is None else base.id,
        metadata_=body.metadata,
        suffix=body.name,
        num_gpus=0,
        total_steps=body.total_steps,
        started_at=func.clock_timestamp(),
    )
    session.add(run)
    session.flush()
    spec = RunSpec(
        request=body,
        policy=policy,
        benchmarks=tuple(_plan(found) for found in watched),
        baseline_key=_baseline_key(session, run, base, body),
    )
    run.spec = spec.model_dump(mode="json")
    session.flush()
    add_transition(session, run, run.state, "External run registered.", data={"code": "registered"})
    if spec.baseline_key != run_key(run.id):
        _check_baselines(session, run, watch_of(session, run))
    session.refresh(run)
    return run


def get_run(session: Session, project_id: UUID, run_id: UUID) -> Job:
    """One run.

    Raises:
        NotFound: The project has no such run.
    """
    return ExternalRunRepository(session).get(project_id, run_id)


def list_runs(
    session: Session, project_id: UUID, *, after: UUID | None = None, limit: int = 20
) -> tuple[list[Job], bool]:
    """A page of runs, newest first, and whether there are more.

    Raises:
        NotFound: `after` is not a run of the project.
    """
    repository = ExternalRunRepository(session)
    last = None if after is None else repository.get(project_id, after)
    found = repository.list_page(project_id, after=last, limit=limit + 1)
    return found[:limit], len(found) > limit


def list_decisions_after(
    session: Session, run: Job, *, after: UUID | None, limit: int
) -> tuple[list[DecisionRow], bool]:
    """Decisions made after one, oldest first, and whether there are more.

    Raises:
        NotFound: The run has no decision `after`.
    """
    found = ExternalRunRepository(session).list_decisions_after(run, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit


def list_acknowledged(session: Session, job_id: UUID, rows: list[DecisionRow]) -> dict[UUID, int]:
    """The steps before which decisions took effect, by the decision's id; without those not told yet."""
    versions = {row.id: int(row.reply["version"]) for row in rows if "version" in row.reply}
    orders = ExternalRunRepository(session).list_orders(job_id, list(versions.values()))
    steps = {key: orders[version].effective_step for key, version in versions.items()}
    return {key: step for key, step in steps.items() if step is not None}


def acknowledge(
    session: Session, project_id: UUID, run_id: UUID, decision_id: UUID, body: Acknowledge
) -> DecisionRow:
    """Keeps the step before which a decision took effect; the first word stays.

    Raises:
        NotFound: The project has no such run, or the run no such decision.
        Conflict: The decision told the trainer nothing.
    """
    run = ExternalRunRepository(session).get(project_id, run_id, for_update=True)
    row = session.get(DecisionRow, decision_id)
    if row is None or row.job_id != run.id:
        raise NotFound("The run has no decision with this id.", "decision_id")
    if "version" not in row.reply:
        raise Conflict(
            f"The decision is '{row.action}', which told the trainer to change nothing.",
            "decision_id",
            "nothing_to_acknowledge",
        )
    order = ExternalRunRepository(session).list_orders(run.id, [row.reply["version"]])
    given: JobOrder = order[row.reply["version"]]
    if given.effective_step is None:
        given.effective_step = body.step
        session.flush()
    return row


def finish_run(session: Session, project_id: UUID, run_id: UUID, body: FinishRun) -> Job:
    """Ends a run, with its last reading as its verdict; ending it again in the same way changes nothing.

    Raises:
        NotFound: The project has no such run.
        Conflict: It ended otherwise.
    """
    run = ExternalRunRepository(session).get(project_id, run_id, for_update=True)
    state = JobState(body.status)
    if run.state is state:
        return run
    if run.state.is_terminal:
        raise Conflict(f"The run is {run.state.value} already.", "status", "run_already_ended")
    looks = ExternalRunRepository(session).list_since_last_look(run.id)
    run.report = None if not looks else {"verdict": looks[0].evidence["look"]["reading"]}
    run.finished_at = func.clock_timestamp()
    run.move_to(state)
    if state is JobState.FAILED:
        run.error = {
            "code": "external_failure",
            "message": body.message or "The trainer reported a failure.",
            "param": None,
        }
    session.flush()
    message = body.message or f"External run {state.value}."
    level: Level = "error" if state is JobState.FAILED else "info"
    add_transition(session, run, state, message, level=level, data={"code": "finished"})
    session.refresh(run)
    return run


def run_key(run_id: UUID) -> str:
    """Whose scores a run's own baseline is, in the history."""
    return f"run/{run_id}"


def watch_of(session: Session, run: Job) -> Watch:
    """What a run watches."""
    spec = RunSpec.model_validate(run.spec)
    ids = [row_id(plan.benchmark_version_id) for plan in spec.benchmarks]
    return Watch(
        policy=spec.policy,
        is_watched=True,
        baseline_key=spec.baseline_key,
        benchmarks=spec.benchmarks,
        versions=HistoryRepository(session).list_versions(ids),
        gate_items=None,
    )


def _policy(session: Session, project_id: UUID, body: CreateRun) -> Policy:
    """The run's own policy, else the project's default without a lever that the run lacks."""
    if body.policy is not None:
        return body.policy
    default = ProjectJobRepository(session).get_project(project_id).default_policy
    policy = Policy() if default is None else Policy.model_validate(default)
    if policy.lever is not None and policy.lever not in {lever.type for lever in body.levers}:
        return policy.model_copy(update={"lever": None})
    return policy


def _watched(
    session: Session,
    project_id: UUID,
    base: BaseModel | None,
    policy: Policy,
    *,
    is_default: bool,
) -> tuple[tuple[Watched, ...], Policy]:
    """What a run watches, and its policy with the versions of it."""
    try:
        watched = resolve_watched(session, project_id, base, policy.benchmarks)
        policy = pin_metric(policy, watched, is_default=is_default)
    except (BadRequest, NotFound) as error:
        raise _at_policy(error) from None
    if not watched:
        raise BadRequest(
            "policy.benchmarks: name what is watched; the model has no suite here.",
            "policy.benchmarks",
            "nothing_watched",
        )
    return watched, tighten(policy, watched)


def _at_policy(error: RetainError) -> RetainError:
    """The error with the policy where a run's body has it."""
    param = None if error.param is None else error.param.replace(_POLICY_PATH, "policy")
    return type(error)(error.message.replace(_POLICY_PATH, "policy"), param, error.code)


def _plan(found: Watched) -> BenchmarkPlan:
    return plan_benchmark(found.benchmark, weight=found.weight, max_drop=found.max_drop)


def _baseline_key(session: Session, run: Job, base: BaseModel | None, body: CreateRun) -> str:
    """Whose scores the run's are paired with: its own, its base model's, or those of an earlier run."""
    if body.baseline == "posted":
        return run_key(run.id)
    if body.baseline == "base_model":
        if base is None:
            raise BadRequest(
                f"baseline: no base model is called '{body.model[:80]}'; post the baseline.",
                "baseline",
                "baseline_unknown",
            )
        plain = not base.has_chat_template
        return baseline_key(
            BasePlan(name=base.name, directory="", sha256=base.sha256, default_template=plain)
        )
    if not body.baseline.startswith(PREFIXES["run"]):
        raise BadRequest(
            "baseline: 'posted', 'base_model', or the id of an earlier run.", "baseline"
        )
    key = parse_id("run", body.baseline, param="baseline")
    try:
        earlier = ExternalRunRepository(session).get(run.project_id, key)
    except NotFound:
        raise NotFound(
            f"baseline: no run has the id '{body.baseline}'.", "baseline", "baseline_unknown"
        ) from None
    return RunSpec.model_validate(earlier.spec).baseline_key


def _check_baselines(session: Session, run: Job, watch: Watch) -> None:
    """Refuses a baseline that is to be known and is not, and says what can be seen with it."""
    history = HistoryRepository(session)
    for plan in watch.general():
        if history.find_baseline(watch.baseline_key, row_id(plan.benchmark_version_id)) is None:
            raise BadRequest(
                f"baseline: nothing is known of '{plan.name}' there; post the baseline.",
                "baseline",
                "baseline_unknown",
            )
    refresh_power(session, run, watch)
