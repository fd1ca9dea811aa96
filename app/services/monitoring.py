"""The closed loop's one function: scores in, verdict and decision written, and what the trainer does next."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Checkpoint, DecisionRow, Job
from app.db.repositories.history import HistoryRepository
from app.domain.benchmarks import BenchmarkScores
from app.domain.decisions import (
    Action,
    ControllerState,
    Decision,
    Look,
    Reading,
    Verdict,
)
from app.domain.diagnosis import replay_rate
from app.domain.gains import read_gains
from app.domain.messages import DecisionReply, Evaluated, Finished, RollBack
from app.domain.power import Power, power
from app.domain.publishing import Publication, judge_publication
from app.domain.replay import replay
from app.domain.runplan import BasePlan
from app.domain.sensing import read_report, read_sensor
from app.domain.spec import JobSpec
from app.domain.states import CheckpointStatus
from app.errors import Fenced
from app.services.decisions import (
    RUN,
    START,
    apply_decision,
    find_publish_target,
    in_force,
    list_facts,
    roll_back_of,
)
from app.services.early_stopping import metric_of
from app.services.evaluations import (
    EvaluationPoint,
    Watch,
    add_evaluation,
    baseline_key,
    load_watch,
    merge_baseline,
    plan_power,
    row_id,
    sense_scores,
)
from app.services.events import add_job_event


@dataclass(frozen=True, slots=True)
class FinalVerdict:
    """The report test of what is published and of the tuned weights, and what follows."""

    publication: Publication
    published: Reading | None
    tuned: Reading | None


def record_baseline(session: Session, job: Job, scores: Sequence[BenchmarkScores]) -> Power:
    """Keeps scores of the starting model for all jobs on that base, and says anew what can be seen.

    Args:
        session: The caller's transaction, already fenced.
        job: A claimed job.
        scores: New ones alone; an item that has a score keeps it.
    """
    watch = load_watch(session, job)
    names = {row_id(plan.benchmark_version_id): plan.name for plan in watch.benchmarks}
    for found in scores:
        version = watch.versions[row_id(found.benchmark_version_id)]
        merge_baseline(session, watch.baseline_key, version, names[version.id], found)
    general = {row_id(plan.benchmark_version_id) for plan in watch.general()}
    is_new = any(row_id(found.benchmark_version_id) in general for found in scores)
    return refresh_power(session, job, watch, is_new=is_new)


def refresh_power(
    session: Session, job: Job, watch: Watch | None = None, *, is_new: bool = True
) -> Power:
    """Computes the sensor's power from the baselines there are and keeps it on the job.

    It is told as an event once every watched benchmark has its baseline, when that `is_new`: baselines arrive
    one by one, and figures from a part of them would mislead.
    """
    watch = load_watch(session, job) if watch is None else watch
    planned = plan_power(session, watch)
    found = power(watch.policy, planned)
    job.power = found.model_dump(mode="json")
    if watch.is_watched and is_new and all(p.baseline is not None for p in planned):
        floors = [name for name, estimate in found.benchmarks.items() if estimate.at_floor]
        add_job_event(
            session,
            job,
            level="warn" if floors else "info",
            message=_describe_power(found, floors),
            data={"code": "sensor_power", "power": job.power},
        )
    return found


def record_evaluation(
    session: Session, job_id: UUID, attempt: int, message: Evaluated
) -> DecisionReply:
    """Records an evaluation point of a run and what is decided on it; one transaction, by the caller.

    The job's row is locked first. A point that was decided already, by whichever attempt, gets the recorded
    decision: it is no new look. A trainer that is behind a rollback is sent to its target.

    Raises:
        Fenced: The attempt no longer holds the job, or its branch is unknown.
    """
    history = HistoryRepository(session)
    job = history.lock_job(job_id)
    if job is None or job.attempt != attempt or not job.state.is_leased:
        raise Fenced(f"attempt {attempt} does not hold the job")
    recorded = history.find_decision(job.id, message.branch, message.step, RUN)
    if recorded is not None:
        reply = DecisionReply.model_validate(recorded.reply)
        return reply.model_copy(update={"reply_to": message.id})
    if message.branch != job.branch:
        return _catch_up(history, job, message)
    watch = load_watch(session, job)
    checkpoint = history.find_checkpoint(job.id, message.branch, message.step)
    _add_evaluations(session, job, watch, message, checkpoint)
    reading = read_sensor(
        watch.policy,
        sense_scores(session, watch, message.scores),
        look=history.count_looks(job.id) + 1,
    )
    if checkpoint is not None:
        checkpoint.status = checkpoint_status(reading, losses_finite=message.losses_finite)
        checkpoint.is_evaluated = True
        checkpoint.valid_loss = message.valid_loss
        if message.valid_mean_token_accuracy is not None:
            accuracy = {"full_valid_mean_token_accuracy": message.valid_mean_token_accuracy}
            checkpoint.metrics = checkpoint.metrics | accuracy
        session.flush()
    look = Look(
        branch=message.branch,
        step=message.step,
        is_last=message.is_last,
        reading=reading,
        valid_loss=message.valid_loss,
        metric=metric_of(watch, message.scores),
        train_loss_finite=message.losses_finite,
        diagnosis=message.diagnosis if reading.verdict is Verdict.REGRESS else None,
        checkpoints=list_facts(history, job),
    )
    row = apply_decision(session, job, watch.policy, look, origin=RUN)
    decision = in_force(row)
    reply = _reply(history, job, watch, message, look, decision)
    row.reply = reply.model_dump(mode="json")
    if decision.action is Action.ROLL_BACK:
        row.carry = message.carry.model_dump(mode="json")
    session.flush()
    return reply


def replay_decision(row: DecisionRow) -> Decision:
    """Recomputes a recorded decision from its evidence; it equals the recorded one."""
    return replay(row.evidence)


def final_verdict(session: Session, job: Job, finished: Finished) -> FinalVerdict:
    """The one test on the report set, of what is published and of the tuned weights; the scores are kept.

    Args:
        session: The caller's transaction, already fenced.
        job: The job.
        finished: The trainer's last message.
    """
    watch = load_watch(session, job)
    tuned = _read_report(session, watch, finished.tuned_report)
    is_tuned = finished.report == finished.tuned_report and not finished.merged_baseline
    watch = _beside_the_whole(session, job, watch, finished.merged_baseline)
    published = tuned if is_tuned else _read_report(session, watch, finished.report)
    checkpoint = (
        None
        if finished.checkpoint_id in {"", START}
        else session.get(Checkpoint, row_id(finished.checkpoint_id))
    )
    point = EvaluationPoint(
        purpose="report",
        branch=job.branch if checkpoint is None else checkpoint.branch,
        step=job.step if checkpoint is None else checkpoint.step,
        checkpoint_id=None if checkpoint is None else checkpoint.id,
    )
    _add_scores(session, job, watch, finished.report or finished.tuned_report, point)
    return FinalVerdict(
        publication=judge_publication(
            watch.policy if watch.is_watched else None,
            published,
            alpha=finished.alpha,
            is_off=JobSpec.model_validate(job.spec).is_unwatched_by_wish,
        ),
        published=published,
        tuned=tuned,
    )


def judge_scores(
    session: Session,
    job: Job,
    scores: Sequence[BenchmarkScores],
    merged_baseline: Sequence[BenchmarkScores] = (),
) -> Reading | None:
    """The report test of scores that are not kept; None where the job watches nothing."""
    watch = _beside_the_whole(session, job, load_watch(session, job), merged_baseline)
    return _read_report(session, watch, scores)


def _beside_the_whole(
    session: Session, job: Job, watch: Watch, baseline: Sequence[BenchmarkScores]
) -> Watch:
    """The watch on a quantised run's adapters merged into the whole base: that base's own scores are kept for it."""
    if not baseline or job.run_plan is None:
        return watch
    base = BasePlan.model_validate(job.run_plan["base"])
    whole = dataclasses.replace(watch, baseline_key=baseline_key(base.quantized("none")))
    names = {row_id(plan.benchmark_version_id): plan.name for plan in watch.benchmarks}
    for found in baseline:
        version = watch.versions[row_id(found.benchmark_version_id)]
        merge_baseline(session, whole.baseline_key, version, names[version.id], found)
    return whole


def _catch_up(history: HistoryRepository, job: Job, message: Evaluated) -> DecisionReply:
    """The answer to a trainer whose branch was left by a rollback ordered from outside: go to its target."""
    row = history.find_rollback(job)
    if message.branch > job.branch or row is None or job.controller_state is None:
        raise Fenced(f"branch {message.branch} is not the job's branch {job.branch}")
    return DecisionReply(
        reply_to=message.id,
        action=Action.ROLL_BACK.value,
        reason=row.reason,
        state=ControllerState.model_validate(job.controller_state),
        roll_back=RollBack.model_validate(row.reply["roll_back"]),
    )


def _add_evaluations(
    session: Session, job: Job, watch: Watch, message: Evaluated, checkpoint: Checkpoint | None
) -> None:
    point = EvaluationPoint(
        purpose="gate",
        branch=message.branch,
        step=message.step,
        checkpoint_id=None if checkpoint is None else checkpoint.id,
    )
    _add_scores(session, job, watch, message.scores, point)


def _add_scores(
    session: Session,
    job: Job,
    watch: Watch,
    scores: Sequence[BenchmarkScores],
    point: EvaluationPoint,
) -> None:
    names = {row_id(plan.benchmark_version_id): plan.name for plan in watch.benchmarks}
    recorded = HistoryRepository(session).list_evaluated(
        job.id, point.branch, point.step, point.purpose
    )
    for found in scores:
        version = watch.versions[row_id(found.benchmark_version_id)]
        if version.id not in recorded:  # a later attempt measured a report set again
            add_evaluation(session, job, version, names[version.id], found, point)
    session.flush()


def _read_report(
    session: Session, watch: Watch, scores: Sequence[BenchmarkScores]
) -> Reading | None:
    if not watch.is_watched or not scores:
        return None
    reading = read_report(watch.policy, sense_scores(session, watch, scores))
    sensed = sense_scores(session, watch, scores, plans=watch.benchmarks)
    return reading.model_copy(update={"gains": read_gains(watch.policy, sensed)})


def checkpoint_status(reading: Reading, *, losses_finite: bool) -> CheckpointStatus:
    """What a look says of the state that was evaluated."""
    if reading.verdict is Verdict.REGRESS or reading.not_finite or not losses_finite:
        return CheckpointStatus.BAD
    return CheckpointStatus.GOOD if reading.verdict is Verdict.PASS else CheckpointStatus.UNPROVEN


def _reply(
    history: HistoryRepository,
    job: Job,
    watch: Watch,
    message: Evaluated,
    look: Look,
    decision: Decision,
) -> DecisionReply:
    is_rollback = decision.action is Action.ROLL_BACK
    finish = decision.action is Action.STOP or (message.is_last and not is_rollback)
    publish = (
        find_publish_target(history, job, watch.policy if watch.is_watched else None)
        if finish
        else None
    )
    return DecisionReply(
        reply_to=message.id,
        action=decision.action.value,
        reason=decision.reason,
        state=decision.state,
        repair=decision.action is Action.REPAIR,
        replay_rate=replay_rate(look.diagnosis) if decision.action is Action.REPAIR else None,
        roll_back=roll_back_of(history, job) if is_rollback else None,
        finish=finish,
        publish=publish,
        failure="retention_not_met" if finish and publish is None else None,
    )


def _describe_power(found: Power, floors: Sequence[str]) -> str:
    mean = found.mean
    text = "No accuracy benchmark can be read."
    if mean is not None and mean.pass_at_zero is not None:
        seen = "no drop" if mean.regress_at_80 is None else f"a drop of {mean.regress_at_80:.2%}"
        needed = (
            "more than there can be" if mean.items_for_pass_80 is None else mean.items_for_pass_80
        )
        text = (
            f"With {mean.n_items} items a benchmark {seen} is called a regression with 80 % power; "
            f"an undamaged model passes with {mean.pass_at_zero:.0%} ({needed} items make that 80 %)."
        )
    if found.recommended is not None and found.recommended.items is not None:
        wanted = found.recommended
        what = (
            "that an undamaged model passes with 80 %"
            if wanted.binds == "pass"
            else f"that 2 points above the limit are called with 90 %, up to look {wanted.look}"
        )
        text += f" Recommended are {wanted.items} gate items a benchmark; it takes them {what}."
    if floors:
        text += f" At floor, so not watched: {', '.join(floors)}."
    return text
