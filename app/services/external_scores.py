"""Scores that external runs post: the baseline, and evaluation points that are decided on as a job's own are."""

from collections.abc import Sequence
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from app.db.models import DecisionRow, Evaluation, Job
from app.db.repositories.external_runs import ExternalRunRepository
from app.db.repositories.history import HistoryRepository
from app.domain.benchmarks import BenchmarkScores, Scorer
from app.domain.decisions import CheckpointFact, Look, Reading
from app.domain.external import (
    PostBaseline,
    PostEvaluation,
    RunSpec,
    live_checkpoints,
    point_id,
)
from app.domain.sensing import read_sensor
from app.errors import BadRequest, Conflict
from app.services.decisions import RUN, apply_decision, in_force
from app.services.early_stopping import metric_of
from app.services.evaluations import (
    EvaluationPoint,
    Watch,
    add_evaluation,
    fill_scores,
    row_id,
    sense_scores,
    unpack_bytes,
)
from app.services.events import add_job_event
from app.services.external_items import Aligned, align_all, find_plan, with_tokens
from app.services.external_runs import run_key, watch_of
from app.services.monitoring import checkpoint_status, refresh_power
from app.services.orders import give_order, told_by
from app.services.storage import Storage

EXTERNAL_RUN = "external_run"  # the subject type of a run's evaluations


def record_run_baseline(
    session: Session, storage: Storage, project_id: UUID, run_id: UUID, body: PostBaseline
) -> Job:
    """Keeps scores of the model that a run starts from; an item that has a score keeps it.

    Raises:
        NotFound: The project has no such run.
        Conflict: The run ended, was evaluated already or has its baseline from elsewhere; or a score differs from
            the one that was posted before.
        BadRequest: A benchmark isn't watched, an item isn't its, or a score is out of range.
    """
    run = _lock_open(session, project_id, run_id)
    spec, watch = RunSpec.model_validate(run.spec), watch_of(session, run)
    if spec.baseline_key != run_key(run.id):
        raise Conflict(
            f"The run's baseline is that of '{spec.request.baseline}'.", "scores", "baseline_fixed"
        )
    if HistoryRepository(session).count_looks(run.id):
        raise Conflict(
            "The run was evaluated already, so its baseline stays as it is.",
            "scores",
            "baseline_closed",
        )
    for place, found in enumerate(align_all(session, storage, watch, body.scores)):
        path = f"scores.{place}.items"
        if np.isinf(found.values).any():
            raise BadRequest(f"{path}: a baseline's scores are numbers.", path)
        if found.plan.scorer is Scorer.NLL and found.tokens is None:
            raise BadRequest(f"{path}: items of nll come with their `tokens`.", path)
        _merge(session, run, found, path)
    refresh_power(session, run, watch)
    session.refresh(run)
    return run


def record_run_evaluation(
    session: Session, storage: Storage, project_id: UUID, run_id: UUID, body: PostEvaluation
) -> DecisionRow:
    """Records an evaluation point of a run and what is decided on it.

    A point that was decided already gets the recorded decision: it is no new look. A trainer that is behind a
    rollback is answered with that rollback.

    Raises:
        NotFound: The project has no such run.
        Conflict: The run ended, has no baseline yet, never had this branch, or other benchmarks of the point
            were decided on.
        BadRequest: A benchmark isn't watched, an item isn't its, or a score is out of range.
    """
    run = ExternalRunRepository(session).get(project_id, run_id, for_update=True)
    history, watch = HistoryRepository(session), watch_of(session, run)
    recorded = history.find_decision(run.id, body.branch, body.step, RUN)
    if recorded is not None:
        _check_same_point(history, run, watch, body)
        return recorded
    _check_open(run)
    if body.branch != run.branch:
        row = history.find_rollback(run)
        if body.branch > run.branch or row is None:
            raise Conflict(
                f"branch: the run is on branch {run.branch}; a rollback begins the next.",
                "branch",
                "unknown_branch",
            )
        return row
    _check_baseline(history, watch)
    aligned = align_all(session, storage, watch, body.scores)
    scores = [with_tokens(history, watch, found).as_scores() for found in aligned]
    _add_evaluations(session, run, aligned, scores, body)
    reading = read_sensor(
        watch.policy,
        sense_scores(session, watch, scores),
        look=history.count_looks(run.id) + 1,
    )
    look = Look(
        branch=body.branch,
        step=body.step,
        is_last=body.is_last,
        reading=reading,
        valid_loss=body.valid_loss,
        metric=metric_of(watch, scores),
        train_loss_finite=body.losses_finite,
        repair_possible=False,  # the weights are the trainer's, so they can't be searched here
        checkpoints=_facts(session, run, body, reading),
    )
    run.step = body.step
    row = apply_decision(session, run, watch.policy, look, origin=RUN)
    if told_by(row):
        give_order(session, run, row)
    return row


def run_facts(session: Session, run: Job) -> tuple[CheckpointFact, ...]:
    """What a run can go back to now: what its trainer could restore at the latest look, but for what was left since."""
    rows = ExternalRunRepository(session).list_since_last_look(run.id)
    look = Look.model_validate(rows[0].evidence["look"]) if rows else None
    return live_checkpoints(look, [in_force(row) for row in rows])


def _lock_open(session: Session, project_id: UUID, run_id: UUID) -> Job:
    run = ExternalRunRepository(session).get(project_id, run_id, for_update=True)
    _check_open(run)
    return run


def _check_open(run: Job) -> None:
    if run.state.is_terminal:
        raise Conflict(f"The run is {run.state.value} already.", "run_id", "run_already_ended")


def _check_baseline(history: HistoryRepository, watch: Watch) -> None:
    known = [
        history.find_baseline(watch.baseline_key, row_id(plan.benchmark_version_id))
        for plan in watch.general()
    ]
    if not any(known):
        raise Conflict("Post the run's baseline first.", "scores", "baseline_missing")


def _check_same_point(
    history: HistoryRepository, run: Job, watch: Watch, body: PostEvaluation
) -> None:
    """Refuses benchmarks that a point's decision did not rest on: they would be ignored."""
    recorded = history.list_evaluated(run.id, body.branch, body.step, "gate")
    for place, sent in enumerate(body.scores):
        plan = find_plan(watch, place, sent)
        if row_id(plan.benchmark_version_id) not in recorded:
            path = f"scores.{place}.benchmark"
            raise Conflict(
                f"{path}: step {body.step} was decided on without '{sent.benchmark}'; benchmarks of one"
                " point are posted together.",
                path,
                "point_already_decided",
            )


def _merge(session: Session, run: Job, found: Aligned, path: str) -> None:
    """Adds scores to the run's own baseline."""
    key = run_key(run.id)
    row = HistoryRepository(session).find_baseline(key, found.version.id)
    values, tokens = found.values, found.tokens
    if row is None:
        row = Evaluation(
            project_id=run.project_id,
            subject_type=EXTERNAL_RUN,
            subject_key=key,
            job_id=run.id,
            benchmark_version_id=found.version.id,
            benchmark=found.plan.name,
            metric=str(found.version.scorer),
            purpose="baseline",
            source="run",
            branch=0,
            step=0,
        )
        session.add(row)
    elif row.scores is not None:
        known = unpack_bytes(row.scores)
        is_known = ~np.isnan(known)
        both = is_known & ~np.isnan(values)
        if not np.array_equal(known[both], values[both]):
            raise Conflict(
                f"{path}: an item's score differs from the one posted before.",
                path,
                "baseline_differs",
            )
        values = np.where(is_known, known, values)
        if tokens is not None and row.tokens is not None:
            tokens = np.where(is_known, unpack_bytes(row.tokens), tokens)
    fill_scores(row, values, tokens)
    session.flush()


def _add_evaluations(
    session: Session,
    run: Job,
    aligned: Sequence[Aligned],
    scores: Sequence[BenchmarkScores],
    body: PostEvaluation,
) -> None:
    """The point's rows and its line in the log."""
    point = EvaluationPoint("gate", body.branch, body.step, None)
    for found, sent in zip(aligned, scores, strict=True):
        row = add_evaluation(session, run, found.version, found.plan.name, sent, point)
        row.subject_type, row.subject_key = EXTERNAL_RUN, run_key(run.id)
    session.flush()
    add_job_event(
        session,
        run,
        level="info",
        type="metrics",
        message=f"Step {body.step}: evaluated",
        data={
            "step": body.step,
            "branch": body.branch,
            "total_steps": run.total_steps,
            "valid_loss": body.valid_loss,
        },
    )


def _facts(
    session: Session, run: Job, body: PostEvaluation, reading: Reading
) -> tuple[CheckpointFact, ...]:
    """What can be gone back to, this point included, as far as the trainer still has it."""
    here = CheckpointFact(
        checkpoint_id=point_id(body.branch, body.step),
        branch=body.branch,
        step=body.step,
        status=checkpoint_status(reading, losses_finite=body.losses_finite).value,
        valid_loss=body.valid_loss,
    )
    facts = (*run_facts(session, run), here)
    if body.checkpoints is None:
        return facts
    return tuple(fact for fact in facts if fact.step in body.checkpoints)
