"""A fine-tuning attempt, from its first message to its last."""

import statistics
from pathlib import Path

import torch

from app.domain.messages import BaselineMeasured, DecisionReply, Planned, Stopped
from app.domain.policy import Policy
from app.domain.power import plan_evaluations, power
from app.domain.runplan import RunPlan
from workers.training.checkpoints import load_checkpoint, set_carry
from workers.training.conversation import Conversation, StopRequested
from workers.training.finale import finish
from workers.training.loop import start_task, train_step
from workers.training.opening import TIMED_STEPS, open_session, steps_per_epoch
from workers.training.ranks import Ranks
from workers.training.session import (
    Session,
    carry_out,
    evaluate_point,
    is_checkpoint_point,
    is_evaluation_point,
    obey,
)
from workers.training.suite import planned_benchmarks

TIMED_ITEMS = 32  # a benchmark, where the baseline was cached


def fine_tune(plan: RunPlan, talk: Conversation, ranks: Ranks, device: torch.device) -> bool:
    """Runs an attempt; False when it was told to leave before the end.

    Raises:
        TrainingFailed: Data, model or checkpoint make a run impossible.
    """
    session = open_session(plan, talk, ranks, device)
    try:
        measure_baseline(session)
        reply = None
        if plan.resume is None:
            begin(session)
        else:
            reply = resume(session)
        if reply is None:
            reply = train(session)
        finish(session, reply)
    except StopRequested as request:
        leave(session, request)
        return False
    return True


def measure_baseline(session: Session) -> None:
    """Scores the starting model on every item that has no baseline yet."""
    suite, talk = session.suite, session.talk
    session.enter("baseline")
    for watched in suite.benchmarks:
        stop_if_told(session)
        measured = suite.measure_baseline(watched)
        if measured is not None:
            packed = measured.packed(watched.plan.benchmark_version_id, "all")
            seconds = (watched.seconds_per_item or 0.0) * watched.baseline.scores.size
            talk.ask(BaselineMeasured(id=talk.next_id(), scores=(packed,), seconds=seconds))


def begin(session: Session) -> None:
    """Starts at step 0: strategies look at the starting model, then it is saved as a rollback target."""
    run = session.run
    session.enter("fisher")
    stop_if_told(session)
    start_task(run)
    run.teacher.check()
    session.has_started = True
    session.saver.save(run, is_evaluated=False)
    base = session.plan.base
    if session.plan.stages:
        session.talk.note(
            "info",
            "base_snapshot",
            f"The stages start from {base.name} as it is (sha256 {base.sha256[:12]}...), which stays the"
            " teacher, the anchor and the last target of a rollback.",
            base=base.name,
            sha256=base.sha256,
            stages=[stage.name for stage in session.plan.stages],
        )


def resume(session: Session) -> DecisionReply | None:
    """Takes up a checkpoint as if nothing had happened; the last decision where it ended the run."""
    run, point = session.run, session.plan.resume
    if point is None:
        raise ValueError("the plan has no resume point")
    run.teacher.check()
    load_checkpoint(run, Path(point.checkpoint_directory))
    run.branch, run.step = point.branch, point.step
    if point.carry is not None:
        set_carry(run, point.carry)
    if point.state is not None:
        run.use(point.state)
    session.orders += point.orders
    session.has_started = True
    if point.decision is not None:
        return point.decision if carry_out(session, point.decision) else None
    if run.step > 0 and not _is_rolled_back(session) and is_evaluation_point(session):
        return evaluate(session)  # it was saved, but its decision never came
    return None


def _is_rolled_back(session: Session) -> bool:
    """Whether no step was done since a rollback: its target was evaluated on the branch that was left."""
    run, point = session.run, session.plan.resume
    has_run_on = bool(run.history) and run.history[-1].branch == run.branch
    return (point is not None and point.carry is not None) or not has_run_on


def train(session: Session) -> DecisionReply:
    """Trains to the decision that ends the run."""
    run, talk = session.run, session.talk
    session.enter("training")
    timed_from = run.executed
    while True:
        wish = obey(session)
        if wish == "finish":
            reply = evaluate(session, is_last=True)
            if reply is not None:
                return reply
        elif wish is not None:
            raise StopRequested(wish)
        with run.workload.step(run.ctx.device):
            metrics = train_step(run)
        run.workload.end_step(metrics.seconds)
        talk.add_metrics(metrics)
        session.report()
        session.saver.announce()
        has_timed = run.executed - timed_from >= TIMED_STEPS or is_evaluation_point(session)
        if has_timed and not session.is_planned:
            choose_evaluations(session)
        if is_evaluation_point(session):
            reply = evaluate(session)
            if reply is not None:
                return reply
        elif is_checkpoint_point(session):
            session.report(now=True)  # what a resume from here will not tell again
            session.saver.save_beside(run)


def evaluate(session: Session, *, is_last: bool = False) -> DecisionReply | None:
    """Evaluates the step just done and carries out the decision; the decision where it ends the run."""
    is_last = is_last or session.run.step == session.run.training.total_steps
    reply = evaluate_point(session, is_last=is_last)
    return reply if reply is not None and carry_out(session, reply) else None


def choose_evaluations(session: Session) -> None:
    """Spends the evaluation budget: interval and gate items, once, where the job left them open."""
    run, suite, talk, plan = session.run, session.suite, session.talk, session.plan
    policy = plan.policy or Policy()
    seconds = [row.seconds for row in run.history[-TIMED_STEPS:]][-(TIMED_STEPS - 1) :]
    seconds_per_step = statistics.median(seconds)
    seconds_per_item = suite.time_items(TIMED_ITEMS)
    available = {w.plan.name: w.half("gate", suite.gate_items).size for w in suite.benchmarks}
    mean = power(policy, planned_benchmarks(suite)).mean
    chosen = plan_evaluations(
        seconds_per_step,
        seconds_per_item,
        run.training.total_steps,
        policy if plan.eval_interval is None else _with_interval(policy, plan.eval_interval),
        available,
        steps_per_epoch(plan, run.ctx.num_training_rows),
        None if mean is None else mean.items_for_pass_80,
    )
    interval, gate_items = run.ranks.broadcast((chosen.eval_interval, chosen.gate_items))
    cost = sum(seconds_per_item[name] * min(gate_items, n) for name, n in available.items())
    talk.ask(
        Planned(
            id=talk.next_id(),
            eval_interval=interval,
            gate_items=gate_items,
            seconds_per_step=seconds_per_step,
            seconds_per_evaluation=cost,
        )
    )
    session.eval_interval, suite.gate_items, session.is_planned = interval, gate_items, True


def leave(session: Session, request: StopRequested) -> None:
    """Saves where there is something to save and the job is not cancelled; then says goodbye."""
    run, talk = session.run, session.talk
    session.report(now=True)
    if session.has_started and request.mode != "cancel":
        session.saver.save(run, is_evaluated=False)
    talk.ask(Stopped(id=talk.next_id(), mode=request.mode, branch=run.branch, step=run.step))


def stop_if_told(session: Session) -> None:
    """Leaves before training where the supervisor says so; keeps orders for later."""
    orders, stop = session.talk.hear()
    session.orders += orders
    if stop is not None:
        raise StopRequested(stop)


def _with_interval(policy: Policy, interval: int) -> Policy:
    return policy.model_copy(update={"eval_interval": interval})
