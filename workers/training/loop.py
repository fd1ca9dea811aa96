"""The training loop: one step, readable from top to bottom, with the hook order of `strategies.base`."""

# Shape letters: N supervised positions of a micro-batch, V vocabulary.

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.domain.decisions import ControllerState
from app.domain.messages import StepMetrics
from app.domain.spec import ResolvedTraining
from app.errors import TrainingFailed
from workers.data.batches import Rows, RowSampler, build_micro, split_micros
from workers.strategies.base import Strategy
from workers.strategies.batch import Forward, Micro, Stream
from workers.strategies.context import Context, LoraPair
from workers.strategies.penalties import apply_pulls
from workers.training.forward import SelectedLogits, Teacher, student_forward, wide
from workers.training.measuring import Workload
from workers.training.meter import Meter, domain_sums, task_weights
from workers.training.preferences import Preferences, means
from workers.training.ranks import Ranks
from workers.training.schedule import learning_rate_factor
from workers.training.tasks import Task, task_at

TASK_TOKENS = "task_tokens"  # what task cross-entropy is divided by


@dataclass
class Run:
    """A run in memory: what `build.py` made, and where training stands."""

    training: ResolvedTraining
    model: nn.Module
    student: SelectedLogits
    teacher: Teacher
    strategies: tuple[Strategy, ...]  # sorted by kind
    ctx: Context
    ranks: Ranks
    stores: dict[str, Rows]
    sampler: RowSampler
    tasks: tuple[Task, ...]
    all_params: dict[str, nn.Parameter]  # those that some task trains; `ctx.params` are the task's
    all_pairs: tuple[LoraPair, ...]
    make_optimizer: Callable[["Run"], torch.optim.Optimizer]
    controller: ControllerState
    optimizer: torch.optim.Optimizer = field(init=False)  # of the task at hand
    spare_padding: int | None = None
    preferences: Preferences | None = None  # of a run that compares answers
    streams: tuple[Stream, ...] = ()
    step: int = 0  # accepted steps; a rollback rewinds it
    branch: int = 0
    executed: int = 0  # steps done over all branches; never rewound
    trained_tokens: int = 0  # supervised and not, over all branches
    not_finite_in_a_row: int = 0
    history: list[StepMetrics] = field(default_factory=list)  # of the accepted steps
    workload: Workload = field(default_factory=Workload)  # of this attempt

    def use(self, controller: ControllerState) -> None:
        """Sets the coefficients in force; effective from the next step.

        Raises:
            TrainingFailed: A strategy that is turned on lacks the rows it draws from.
        """
        self._set_coefs(controller)
        self.refresh_streams()

    def _set_coefs(self, controller: ControllerState) -> None:
        self.controller = controller
        self.ctx.coefs = {s.kind: controller.strengths.get(s.kind, 0.0) for s in self.strategies}

    def refresh_streams(self) -> None:
        """Asks every strategy which rows are drawn from now on."""
        streams: tuple[Stream, ...] = (self.tasks[self.ctx.task_index].stream,)
        try:
            for strategy in self.strategies:
                streams = strategy.edit_streams(self.ctx, streams)
        except ValueError as error:
            raise TrainingFailed(str(error), "retention.strategies") from error
        self.streams = self.ctx.streams = streams

    def enter(self, index: int) -> None:
        """Sets up what follows from the task alone: what is trained, by which optimiser, on which rows.

        Raises:
            TrainingFailed: A strategy does not fit the model or the task.
        """
        task, ctx = self.tasks[index], self.ctx
        ctx.task_index, ctx.task_name = index, task.name
        ctx.task_first_step, ctx.task_steps = task.first_step, task.training.total_steps
        ctx.schedule = partial(learning_rate_factor, task.training)
        self._set_coefs(self.controller)
        ctx.num_training_rows = len(task.stream.rows)
        names = self._trainable(task)
        for name, parameter in self.all_params.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        ctx.params = {name: p for name, p in self.all_params.items() if name in names}
        ctx.lora_pairs = tuple(pair for pair in self.all_pairs if pair.lora_B.requires_grad)
        try:
            self.optimizer = self.make_optimizer(self)
        except ValueError as error:
            raise TrainingFailed(str(error), "retention.strategies") from error
        self.use(self.controller)

    def _trainable(self, task: Task) -> frozenset[str]:
        names = task.trained or frozenset(self.all_params)
        try:
            for strategy in self.strategies:
                names = strategy.edit_trainable(self.ctx, names)
        except ValueError as error:
            raise TrainingFailed(str(error), "retention.strategies") from error
        return names


def enter_due_task(run: Run) -> None:
    """At the boundary of two tasks: strategies take leave of the one and look at the other.

    Raises:
        TrainingFailed: A strategy can't begin it.
    """
    index = task_at(run.tasks, run.step)
    if index == run.ctx.task_index:
        return
    for strategy in run.strategies:
        strategy.on_task_end(run.ctx)
    run.enter(index)
    start_task(run)
    run.teacher.check()


def start_task(run: Run) -> None:
    """Strategies look at the model a task starts from.

    Raises:
        TrainingFailed: One of them can't begin, such as for want of rows.
    """
    try:
        for strategy in run.strategies:
            strategy.on_task_start(run.ctx)
    except ValueError as error:
        raise TrainingFailed(str(error), "retention.strategies") from error


def train_step(run: Run) -> StepMetrics:
    """One optimiser step; the numbers in brackets are those of the hook order."""
    started = time.perf_counter()
    enter_due_task(run)
    ctx, strategies, params = run.ctx, run.strategies, list(run.ctx.params.values())
    _seed_step(run)
    ctx.step = run.step
    ctx.learning_rates = _set_learning_rates(run)
    for strategy in strategies:
        strategy.on_step_start(ctx)  # [5]
    if any(strategy.streams_changed(ctx) for strategy in strategies):
        run.refresh_streams()
    micros = _next_micros(run)  # [6]
    run.workload.add(micros)
    needs = [strategy.step_needs(ctx) for strategy in strategies]
    meter = Meter()

    def backward(some: Sequence[Micro], *, task_only: bool = False) -> None:
        speaking = () if task_only else strategies
        counts = run.ranks.sum_counts(_count(run, some, speaking))
        meter.count(counts)
        for micro in some:
            out = student_forward(
                run.student, run.teacher, micro, () if task_only else needs
            )  # [7]
            _loss(run, micro, out, counts, meter, speaking).backward()  # [8]
        run.ranks.sum_gradients(params)

    owners = [s for s, need in zip(strategies, needs, strict=True) if need.step_owner]
    if owners:
        owners[0].compute_grads(ctx, micros, backward)
    else:
        backward(micros)
    held = _edit_gradients(run)
    grad_norm = float(nn.utils.clip_grad_norm_(params, run.training.max_grad_norm))  # [11]
    totals = run.ranks.sum_counts(meter.read())
    is_finite = math.isfinite(grad_norm) and math.isfinite(totals.get("loss", 0.0))
    if (
        is_finite
    ):  # else the weights stay as they are: three such steps in a row end in an evaluation
        snapshot = _snapshot(run)
        run.optimizer.step()  # [12]
        _edit_displacement(run, snapshot, held)  # [13]
        for strategy in strategies:
            strategy.on_step_end(ctx)  # [14]
    run.optimizer.zero_grad(set_to_none=True)
    run.not_finite_in_a_row = 0 if is_finite else run.not_finite_in_a_row + 1
    run.step += 1
    run.executed += 1
    run.trained_tokens += meter.tokens
    metrics = _metrics(run, totals, meter.tokens, grad_norm, time.perf_counter() - started)
    run.history.append(metrics)
    return metrics


def _edit_gradients(run: Run) -> frozenset[str]:
    """What strategies see of the loss's gradient and do to it; the names that this step holds."""
    for strategy in run.strategies:
        strategy.read_grads(run.ctx)  # [8b]
    for strategy in run.strategies:
        strategy.add_grads(run.ctx)  # [9]
    for strategy in run.strategies:
        strategy.edit_grads(run.ctx)  # [10]
    return _hold(run)


def _seed_step(run: Run) -> None:
    """Dropout of a step follows from (seed, steps executed, rank): so it survives resumes and rank counts."""
    mixed = (run.training.seed * 1_000_003 + run.executed) * 4_099 + run.ranks.rank
    torch.manual_seed(mixed % (2**63 - 25))


def _set_learning_rates(run: Run) -> dict[str, float]:
    task = run.tasks[run.ctx.task_index]
    factor = run.controller.learning_rate_scale * learning_rate_factor(
        task.training, run.step - task.first_step
    )
    rates = {}
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates.update(dict.fromkeys(group["names"], float(group["lr"])))
    return rates


def _next_micros(run: Run) -> list[Micro]:
    """This rank's micro-batches of the step, planned alike on every rank, after every `edit_batch`."""
    drawn = run.sampler.draw(run.streams)
    split = split_micros if run.preferences is None else run.preferences.plan
    planned = split(
        drawn,
        {name: store.lengths for name, store in run.stores.items()},
        max_tokens=run.training.max_tokens_per_micro_batch,
        spare_padding=run.spare_padding,
    )
    micros = []
    for rows in planned[run.ranks.rank :: run.ranks.world_size]:
        micro = build_micro(rows, run.stores, run.ctx.device)
        for strategy in run.strategies:
            micro = strategy.edit_batch(run.ctx, micro)
        if micro.positions_N.numel():
            micros.append(micro)
    for strategy in run.strategies:
        strategy.before_backward(run.ctx, micros)
    return micros


def _count(run: Run, micros: Sequence[Micro], strategies: Sequence[Strategy]) -> dict[str, float]:
    """What each term is divided by, known before the first backward, and the tokens read."""
    counts: dict[str, float] = {}
    for micro in micros:
        own: dict[str, float] = {
            TASK_TOKENS: float(task_weights(micro).sum()),
            "tokens": float(micro.input_ids_BT.numel()),
        }
        if run.preferences is not None:
            own.update(run.preferences.count(micro))
        for strategy in strategies:
            own.update(strategy.count_terms(run.ctx, micro))
        for key, count in own.items():
            counts[key] = counts.get(key, 0.0) + count
    return counts


def _loss(
    run: Run,
    micro: Micro,
    out: Forward,
    counts: Mapping[str, float],
    meter: Meter,
    strategies: Sequence[Strategy],
) -> Tensor:
    """Sum of coef * numerator / step-wide count over the task's and the strategies' terms."""
    losses_N = F.cross_entropy(wide(out.logits_NV), micro.targets_N, reduction="none")
    weighted_N = losses_N * task_weights(micro)
    total = weighted_N.sum() / max(counts[TASK_TOKENS], 1e-12)
    if run.preferences is None:
        sums = domain_sums(micro, weighted_N)
    else:
        total, sums = run.preferences.loss(micro, losses_N, total, counts)
    values = {}
    for strategy in strategies:
        for term in strategy.loss_terms(run.ctx, micro, out):
            if term.coef != 0.0:
                addend = term.coef * term.numerator / max(counts[term.denominator_key], 1e-12)
                total = total + addend
                values[f"loss/{term.name}"] = addend.detach()
    meter.add(micro, out.logits_NV, {"loss": total.detach(), **values, **sums})
    return total


def _snapshot(run: Run) -> dict[str, Tensor]:
    """Weights from before the step, only where some strategy edits the displacement."""
    if not any(strategy.step_needs(run.ctx).snapshot for strategy in run.strategies):
        return {}
    return {name: parameter.detach().clone() for name, parameter in run.ctx.params.items()}


def _hold(run: Run) -> frozenset[str]:
    """What no strategy and no momentum may move in this step: a parameter without gradient is skipped."""
    held: frozenset[str] = frozenset().union(*(s.held(run.ctx) for s in run.strategies))
    for name in held & run.ctx.params.keys():
        run.ctx.params[name].grad = None
    return held


def _edit_displacement(run: Run, snapshot: Mapping[str, Tensor], held: frozenset[str]) -> None:
    """[13a] all pulls in one implicit step, then [13b, c] constraints on the real displacement."""
    ctx = run.ctx
    pulls = [pulls for strategy in run.strategies if (pulls := strategy.prox_pulls(ctx))]
    if held:
        pulls = [{n: p for n, p in of_one.items() if n not in held} for of_one in pulls]
    if pulls:
        apply_pulls(ctx.params, pulls, ctx.learning_rates)
    if not snapshot:
        return
    first = {name: ctx.params[name].detach() - old for name, old in snapshot.items()}
    delta = dict(first)
    for strategy in sorted(run.strategies, key=lambda s: (s.update_rank, s.kind)):
        if strategy.step_needs(ctx).snapshot:
            delta = strategy.edit_update(ctx, snapshot, delta)
    with torch.no_grad():
        for name, old in snapshot.items():
            if delta[name] is not first[name] and name not in held:
                ctx.params[name].copy_(old + delta[name])


def _metrics(
    run: Run,
    totals: Mapping[str, float],
    tokens: int,
    grad_norm: float,
    seconds: float,
) -> StepMetrics:
    values: dict[str, float | None] = {"grad_norm": _finite(grad_norm)}
    values |= {key: _finite(v) for key, v in totals.items() if key.startswith("loss")}
    if run.preferences is not None:
        values |= {key: _finite(v) for key, v in means(totals, "train").items()}
    for strategy in run.strategies:
        for name, value in strategy.metrics().items():
            values[f"strategy/{strategy.kind}/{name}"] = _finite(float(value))
    first_group: dict[str, Any] = run.optimizer.param_groups[0]
    return StepMetrics(
        step=run.step,
        branch=run.branch,
        train_loss=_share(totals, "domain_nats", "domain_weight"),
        train_mean_token_accuracy=_share(totals, "domain_right", "domain_tokens"),
        learning_rate=float(first_group["lr"]),
        tokens=tokens,
        seconds=seconds,
        values=values,
    )


def _share(totals: Mapping[str, float], part: str, whole: str) -> float | None:
    return _finite(totals[part] / totals[whole]) if totals.get(whole) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
