"""Diagnosis of a regression: a handful of replay steps on the weights, what they bring back, and the weights again."""

# Shape letters: N supervised positions of a micro-batch.

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from app.domain.decisions import Diagnosis, Reading, Verdict
from app.domain.diagnosis import Lost, conclude, find_lost, measure_recovery, with_scores
from app.domain.policy import Policy
from app.domain.sensing import read_sensor
from workers.data.batches import DrawnRow, build_micro, split_micros
from workers.strategies.batch import Micro
from workers.strategies.modes import evaluating
from workers.training.forward import wide
from workers.training.loop import Run
from workers.training.suite import Marks, Suite

STEPS = 8
RATES = (1 / 3, 1.0, 3.0)  # of the job's learning rate; other general rows say which one to believe
ROWS_PER_STEP = (16, 64)  # the batch size within these bounds
HELD_ROWS = 64  # at most, and a quarter of what there is
LEAST_ROWS = 16  # fewer general rows are no basis
PROBED_ITEMS = 400  # a benchmark, at most, evenly spaced over its gate items
GENERAL = "general"

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Replay:
    """Which general rows the steps read, step by step, and which ones judge them."""

    steps: tuple[Rows, ...]
    held: Rows

    @property
    def num_rows(self) -> int:
        """Different ones that the steps read."""
        return int(np.unique(np.concatenate(self.steps)).size)


def find_regression(run: Run, suite: Suite, policy: Policy | None, marks: Marks) -> Reading | None:
    """The reading of these gate scores where it confirms a regression that is to be diagnosed."""
    if policy is None or not policy.diagnosis or not suite.benchmarks:
        return None
    reading = read_sensor(policy, suite.sensed(marks, "gate"), look=run.controller.evals + 1)
    return reading if reading.verdict is Verdict.REGRESS else None


def diagnose(run: Run, suite: Suite, policy: Policy, reading: Reading, marks: Marks) -> Diagnosis:
    """What a confirmed drop is made of.

    Weights, gradients, RNG states and data cursors are afterwards what they were, bit by bit.

    Args:
        run: Between two steps.
        suite: Its benchmarks.
        policy: Its limits.
        reading: The regression.
        marks: The gate scores behind it.
    """
    started = time.perf_counter()
    reason = why_not(run, reading)
    found = Diagnosis(reason=reason) if reason else _probe(run, suite, policy, reading, marks)
    return found.model_copy(update={"seconds": time.perf_counter() - started})


def why_not(run: Run, reading: Reading) -> str | None:
    """What stands in the way of replay steps; None where nothing does."""
    if reading.not_finite:
        return "a score is not a finite number"
    if GENERAL not in run.stores:
        return "the job has no general data to replay"
    if len(run.stores[GENERAL].lengths) < LEAST_ROWS:
        return f"there are fewer than {LEAST_ROWS} general rows to replay"
    if not run.ctx.params:
        return "nothing is being trained"
    return None


def plan_replay(run: Run) -> Replay:
    """Rows by a generator of the diagnosis's own, from seed, branch and step: a resumed attempt reads the same ones."""
    generator = np.random.default_rng([run.training.seed, run.branch, run.step, 0xD1A6])
    order = generator.permutation(len(run.stores[GENERAL].lengths))
    num_held = min(HELD_ROWS, len(order) // 4)
    held, read = order[:num_held], order[num_held:]
    least, most = ROWS_PER_STEP
    per_step = min(max(run.training.batch_size, least), most)
    places = np.arange(STEPS * per_step).reshape(STEPS, per_step) % len(read)
    return Replay(steps=tuple(read[np.unique(row)] for row in places), held=held)


@contextlib.contextmanager
def throw_away(run: Run) -> Iterator[dict[str, Tensor]]:
    """Inside, the trained weights may be changed at will; they wait on the host, are given, and are put back exactly."""
    params = run.ctx.params
    kept = {name: p.detach().to("cpu", copy=True) for name, p in params.items()}
    devices = [run.ctx.device] if run.ctx.device.type == "cuda" else []
    was_training = run.model.training
    with torch.random.fork_rng(devices=devices):
        try:
            yield kept
        finally:
            put_back(run, kept)
            for parameter in params.values():
                parameter.grad = None
            run.model.train(was_training)


def put_back(run: Run, kept: dict[str, Tensor]) -> None:
    """Sets the trained weights to what was kept."""
    with torch.no_grad():
        for name, parameter in run.ctx.params.items():
            parameter.copy_(kept[name])


def replay_steps(run: Run, replay: Replay, rate: float) -> None:
    """Takes the steps: each weight moves by its learning rate against the gradient's sign.

    That is the first step of Adam without its state, so no moments are held beside those of training.
    """
    rates = {
        name: float(group["base_lr"]) * rate
        for group in run.optimizer.param_groups
        for name in group["names"]
    }
    held: frozenset[str] = frozenset().union(*(s.held(run.ctx) for s in run.strategies))
    moved = {name: p for name, p in run.ctx.params.items() if name not in held}
    run.model.train()
    for place, rows in enumerate(replay.steps):
        torch.manual_seed(run.training.seed * 1_009 + place)
        micros = _micros(run, rows)
        weight = _total(run, sum(float(m.weights_N.sum()) for m in micros))
        for micro in micros:
            (_nats(run, micro) / max(weight, 1e-12)).backward()
        run.ranks.sum_gradients(run.ctx.params.values())
        with torch.no_grad():
            for name, parameter in moved.items():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=rates[name])
            for parameter in run.ctx.params.values():
                parameter.grad = None


def rehearse(run: Run, rate: float) -> int:
    """Takes the steps of the diagnosis for good, of which a few bring lost format back; how many they were."""
    with throw_away(run) as kept:
        replay_steps(run, plan_replay(run), rate)
        kept.update({n: p.detach().to("cpu", copy=True) for n, p in run.ctx.params.items()})
    return STEPS


def held_loss(run: Run, replay: Replay) -> float:
    """Nats per token of the general rows that no step reads."""
    micros = _micros(run, replay.held)
    with torch.no_grad(), evaluating(run.model):
        nats = sum(float(_nats(run, micro)) for micro in micros)
    weight = _total(run, sum(float(m.weights_N.sum()) for m in micros))
    return _total(run, nats) / max(weight, 1e-12)


def _probe(run: Run, suite: Suite, policy: Policy, reading: Reading, marks: Marks) -> Diagnosis:
    """Replays at each rate from the same weights, and scores the lost items where the held rows are best off."""
    parts = find_lost(policy, reading, suite.sensed(marks, "gate", at_most=PROBED_ITEMS))
    replay = plan_replay(run)
    with throw_away(run) as kept:
        before = held_loss(run, replay)
        rate, after = _find_rate(run, replay, kept)
        probe = Diagnosis(steps=STEPS, rows=replay.num_rows, rate=rate)
        if not (math.isfinite(before) and math.isfinite(after)):
            return probe.model_copy(update={"reason": "the replay steps gave no finite number"})
        replay_steps(run, replay, rate)
        scored = [_score_again(suite, part) for part in parts]
    probe = probe.model_copy(update={"held_before": before, "held_after": after})
    return conclude(measure_recovery(scored), probe, [part.name for part in parts])


def _find_rate(run: Run, replay: Replay, kept: dict[str, Tensor]) -> tuple[float, float]:
    """The rate that serves the held rows best, and their loss; higher ones are left out once it gets worse."""
    best, least = RATES[0], math.inf
    for rate in RATES:
        replay_steps(run, replay, rate)
        loss = held_loss(run, replay)
        put_back(run, kept)
        if not loss < least:
            break
        best, least = rate, loss
    return best, least


def _score_again(suite: Suite, part: Lost) -> Lost:
    watched = next(w for w in suite.benchmarks if w.plan.name == part.name)
    indices = suite.indices(watched, "gate", at_most=PROBED_ITEMS)
    return with_scores(part, suite.score(watched.plan, indices).scores[indices])


def _micros(run: Run, rows: Sequence[int] | Rows) -> list[Micro]:
    """This rank's micro-batches of general rows."""
    planned = split_micros(
        [DrawnRow(GENERAL, GENERAL, int(row), is_task=True) for row in rows],
        {GENERAL: run.stores[GENERAL].lengths},
        max_tokens=run.training.max_tokens_per_micro_batch,
        spare_padding=run.spare_padding,
    )
    micros = [
        build_micro(part, run.stores, run.ctx.device)
        for part in planned[run.ranks.rank :: run.ranks.world_size]
    ]
    return [micro for micro in micros if micro.positions_N.numel()]


def _nats(run: Run, micro: Micro) -> Tensor:
    logits_NV = run.student(micro.input_ids_BT, micro.positions_N)
    losses_N = F.cross_entropy(wide(logits_NV), micro.targets_N, reduction="none")
    return (losses_N * micro.weights_N).sum()


def _total(run: Run, value: float) -> float:
    return run.ranks.sum_counts({"value": value})["value"]
