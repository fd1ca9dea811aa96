"""An attempt under way: the run, its suite, and the operations between steps."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from app.domain.decisions import ControllerState, Diagnosis
from app.domain.forecast import Forecast, Seen, count_evaluations
from app.domain.messages import (
    DecisionReply,
    Evaluated,
    Order,
    OrderApplied,
    Repaired,
    RollBack,
)
from app.domain.policy import Policy
from app.domain.runplan import RunPlan
from app.domain.sensing import holds, read_sensor
from workers.data.tokens import TokenStore
from workers.export.interpolate import Interpolation
from workers.training.checkpoints import load_checkpoint, make_carry
from workers.training.conversation import Conversation
from workers.training.diagnosis import diagnose, find_regression, rehearse
from workers.training.loop import Run
from workers.training.saving import Saver
from workers.training.suite import Marks, Suite

NOT_FINITE_LIMIT = 3  # such steps in a row end in an evaluation
REPAIR_STEPS = 20  # the search's grid is alpha = k / 20


class Validated(NamedTuple):
    """What the validation rows say of the weights as they are: the nats of a token, or the loss of a pair."""

    loss: float | None = None
    token_accuracy: float | None = None
    values: Mapping[str, float] = MappingProxyType({})  # of pairs: `valid_reward_margin`, ...


@dataclass
class Session:
    """What an attempt holds beside its run."""

    plan: RunPlan
    run: Run
    talk: Conversation
    tokenizer: Any
    suite: Suite
    validation: TokenStore | None
    validate: Callable[[], Validated]
    line: Callable[[], Interpolation]  # from the base to the weights of the call
    is_planned: bool  # the evaluation budget has chosen what the job left open
    eval_interval: int  # steps; 0: not chosen yet
    first_eval_step: (
        int  # where the budget chose the interval, the steps it timed are not evaluated
    )
    has_started: bool = False  # there is a state worth a checkpoint
    orders: list[Order] = field(default_factory=list)  # not applied yet
    phase: str = "loading"
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    phase_began: float = field(default_factory=time.perf_counter)
    evaluation_seconds: float = 0.0  # of the last one
    forecast: Forecast = field(default_factory=Forecast)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        """Checkpoints go to the job's scratch directory."""
        self.saver = Saver(self.talk, self.scratch, self.plan.attempt)

    @property
    def scratch(self) -> Path:
        """The job's scratch directory."""
        return Path(self.plan.scratch_directory)

    def enter(self, phase: str) -> None:
        """Starts a phase, and says so."""
        self.stop_clock()
        self.phase = phase
        self.report(now=True)

    def stop_clock(self) -> None:
        """Adds the time since the last call to the phase."""
        moment = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + moment - self.phase_began
        self.phase_began = moment

    def report(self, *, now: bool = False) -> None:
        """Progress, at most once a second unless `now`."""
        run = self.run
        self.talk.progress(
            now=now,
            branch=run.branch,
            step=run.step,
            total_steps=run.training.total_steps,
            seconds_remaining=self._foresee(),
            trained_tokens=run.trained_tokens,
            phase=self.phase,
        )

    def _foresee(self) -> float | None:
        """Seconds to the end; a student's training is not foreseen, so neither is the end."""
        run, total = self.run, self.run.training.total_steps
        self.forecast.see(Seen(time.perf_counter(), self.phase, run.step))
        if self.plan.student is not None:
            return None
        stages = [task.last_step for task in run.tasks]
        evaluations = count_evaluations(run.step, total, self.eval_interval, stages)
        return self.forecast.seconds_left(total - run.step, evaluations, self.suite.scoring())


def is_evaluation_point(session: Session) -> bool:
    """Whether the step just done is evaluated: by the calendar, at a stage's end, or for losses gone bad."""
    step = session.run.step
    if any(step == task.last_step for task in session.run.tasks):
        return True
    if session.run.not_finite_in_a_row >= NOT_FINITE_LIMIT:
        return True
    on_calendar = session.eval_interval > 0 and step % session.eval_interval == 0
    return on_calendar and step >= session.first_eval_step


def is_checkpoint_point(session: Session) -> bool:
    """Whether a checkpoint is due that no evaluation asks for."""
    interval = session.run.training.checkpoint_interval
    return interval is not None and session.run.step % interval == 0


def evaluate_point(session: Session, *, is_last: bool) -> DecisionReply | None:
    """Saves the checkpoint, measures it and waits for the decision; None where the disk is full."""
    run, talk = session.run, session.talk
    started = time.perf_counter()
    came_from = session.phase
    session.enter("evaluating")
    valid_loss, valid_accuracy, of_pairs = session.validate()
    session.forecast.validation_seconds = time.perf_counter() - started
    rewards = {name: _finite(value) for name, value in of_pairs.items()}
    if (
        run.history
    ):  # before the checkpoint is saved, so that a resumed attempt's result file has it
        values = {
            **run.history[-1].values,
            "valid_loss": _finite(valid_loss),
            "valid_mean_token_accuracy": _finite(valid_accuracy),
            **rewards,
        }
        run.history[-1] = run.history[-1].model_copy(update={"values": values})
    if not session.saver.save(run, is_evaluated=True):
        if is_last:
            raise OSError("no room for the last checkpoint")  # a crash: tried again elsewhere
        session.enter(came_from)
        return None
    marks = session.suite.measure("gate")
    window = run.history[-max(session.eval_interval, 1) :]
    losses = [row.train_loss for row in window]
    train_loss = (
        sum(x for x in losses if x is not None) / len(losses) if None not in losses else None
    )
    is_finite = run.not_finite_in_a_row < NOT_FINITE_LIMIT
    has_bad_validation = valid_loss is not None and not math.isfinite(valid_loss)
    session.evaluation_seconds = time.perf_counter() - started
    for strategy in run.strategies:
        strategy.on_eval(run.ctx, {} if valid_loss is None else {"valid_loss": valid_loss})
    reply = talk.ask_decision(
        Evaluated(
            id=talk.next_id(),
            branch=run.branch,
            step=run.step,
            is_last=is_last,
            scores=session.suite.packed(marks, "gate"),
            valid_loss=_finite(valid_loss),
            valid_mean_token_accuracy=_finite(valid_accuracy),
            values=rewards,
            train_loss=train_loss if losses else None,
            seconds=session.evaluation_seconds,
            carry=make_carry(run),
            losses_finite=is_finite and not has_bad_validation,
            diagnosis=_diagnose(session, marks),
        )
    )
    session.enter(came_from)
    return reply


def _diagnose(session: Session, marks: Marks) -> Diagnosis | None:
    """What a confirmed drop is made of, in a phase of its own; None where there is none."""
    run, suite, policy = session.run, session.suite, session.plan.policy
    reading = find_regression(run, suite, policy, marks)
    if policy is None or reading is None:
        return None
    came_from = session.phase
    session.enter("diagnosis")
    found = diagnose(run, suite, policy, reading, marks)
    session.enter(came_from)
    return found


def carry_out(session: Session, reply: DecisionReply) -> bool:
    """Repair, coefficients, rollback, in this order; True when the run is to end here."""
    run = session.run
    run.not_finite_in_a_row = 0
    if reply.repair:
        repair(session, reply.replay_rate)
    run.use(reply.state)
    if reply.roll_back is not None:
        roll_back(session, reply.roll_back, reply.state)
    return reply.finish


def roll_back(session: Session, target: RollBack, state: ControllerState) -> None:
    """Takes up the target's weights, optimiser, strategies and step; cursors and RNGs run on."""
    run = session.run
    load_checkpoint(run, Path(target.checkpoint_directory), keep_carry=True)
    run.branch = target.branch
    run.use(state)


def repair(session: Session, replay_rate: float | None = None) -> None:
    """Sets the weights to the point nearest to them, on the line from the base, that holds on gate items.

    Before that come replay steps at `replay_rate`, and what they bring back may be enough.
    The search halves the grid as if drops fell along the line; what it takes has been measured to hold.
    Where no point above the base holds, nothing is changed.
    """
    run, talk, policy = session.run, session.talk, session.plan.policy or Policy()
    replayed = 0 if replay_rate is None else rehearse(run, replay_rate)
    line = session.line()
    tried: dict[str, float | None] = {}

    def holds_at(point: int) -> bool:
        line.set(point / REPAIR_STEPS)
        sensed = session.suite.sensed(session.suite.measure("gate"), "gate")
        tried[f"{point / REPAIR_STEPS:g}"] = read_sensor(policy, sensed, look=1).drop
        return holds(policy, sensed)

    low, high = 0, REPAIR_STEPS  # low holds, or is the base; high does not
    if replayed and holds_at(high):
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds_at(middle) else (low, middle)
    alpha = low / REPAIR_STEPS if low else 1.0
    line.set(alpha)
    talk.ask(
        Repaired(
            id=talk.next_id(),
            branch=run.branch,
            step=run.step,
            alpha=alpha,
            tried=tried,
            replay_steps=replayed,
            holds=low > 0,
        )
    )


def obey(session: Session) -> Literal["pause", "cancel", "drain", "finish"] | None:
    """Applies the orders that are due before the next step; says how to leave, if so told."""
    run, talk = session.run, session.talk
    orders, stop = talk.hear()
    session.orders += orders
    is_finishing = False
    for order in [o for o in session.orders if _is_due(o, run)]:
        session.orders.remove(order)
        if order.effective_step is None:  # else it is applied again, after a resume
            talk.tell(
                OrderApplied(
                    id=talk.next_id(), version=order.version, branch=run.branch, step=run.step + 1
                )
            )
        run.use(order.state)
        if order.roll_back is not None:
            roll_back(session, order.roll_back, order.state)
        is_finishing |= order.stop
    return stop or ("finish" if is_finishing else None)


def _is_due(order: Order, run: Run) -> bool:
    """An order takes effect at the first boundary of its branch, or again where it did before."""
    if order.branch != run.branch:
        return False
    return order.effective_step is None or order.effective_step == run.step + 1


def _finite(value: Any) -> float | None:  # noqa: ANN401 - a float or None
    return value if value is not None and math.isfinite(value) else None
