"""Penalties over the environments of a step, as terms of its micro-batches."""

# Shape letters: B rows, D width, E environments, N positions, V vocabulary.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.batch import Micro
from workers.strategies.invariance import (
    SMALL,
    dummy_gradients,
    mean_coral,
    risk_variance,
    widened,
)

CORAL_ROWS = 32  # a side: fewer give no covariance worth the name


@dataclass(frozen=True)
class Linearised:
    """A function of the environments' means over a whole step, as terms of its micro-batches.

    A variance is not additive over micro-batches, but its gradient is: with the means of the step known
    beforehand, f(m) and sum_e f'_e (m_e - known m_e) agree in value and gradient, and the latter is a sum.
    """

    value: Tensor
    slope_E: Tensor  # derivative with respect to each environment's mean
    mean_E: Tensor
    weight_E: Tensor  # of the whole step

    @classmethod
    def of(
        cls, function: Callable[[Tensor], Tensor], sums_E: Tensor, weight_E: Tensor, used_E: Tensor
    ) -> "Linearised":
        """At the means `sums / weight` of the environments in use.

        Args:
            function: Of the means of the environments in use; a scalar.
            sums_E: Over the step, all ranks.
            weight_E: What they are divided by.
            used_E: bool; the others have slope 0.
        """
        mean_E = sums_E.detach() / weight_E.clamp_min(SMALL)
        leaf = mean_E[used_E].clone().requires_grad_()
        with torch.enable_grad():
            value = function(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        slope_E = torch.zeros_like(mean_E)
        slope_E[used_E] = slope
        return cls(value.detach(), slope_E, mean_E, weight_E)

    def numerator(self, sums_E: Tensor, weight_E: Tensor, used_E: Tensor) -> Tensor:
        """A micro-batch's part, to be divided by the weight of the environments in use over the step."""
        total = self.weight_E[used_E].sum()
        moved_E = self.slope_E * (sums_E - self.mean_E * weight_E) / self.weight_E.clamp_min(SMALL)
        return total * moved_E.sum() + self.value * weight_E[used_E].sum()


def sum_by(values_N: Tensor, environment_N: Tensor, count: int) -> Tensor:
    """Sums by environment in float64; -1 belongs to none."""
    inside = environment_N >= 0
    sums_E = torch.zeros(count, dtype=torch.float64, device=values_N.device)
    return sums_E.index_add(0, environment_N[inside], values_N[inside].double())


class Read(NamedTuple):
    """A micro-batch and what the model makes of it."""

    micro: Micro
    logits_NV: Tensor
    states_BD: Tensor | None  # pooled; where CORAL is on


@dataclass
class StepRisks:
    """The environments of one step: what is known of them beforehand, and the terms that follow.

    Use: `add` for each micro-batch of this rank, `close`, `know` with all of them (without gradient), then
    `numerators` for each. `know` may be left to the only micro-batch of the step.
    """

    num_environments: int
    betas: Mapping[str, float]  # of `vrex`, `irm` and `coral`; those at 0 are left out
    min_rows: int
    device: torch.device
    weight_E: Tensor = field(init=False)
    used_E: Tensor = field(init=False)  # environments with enough rows
    is_known: bool = False
    linear: dict[str, Linearised] = field(default_factory=dict)
    coral_value: Tensor | None = None
    fresh: dict[int, Tensor] = field(default_factory=dict)  # pooled states, by environment
    values: dict[str, float] = field(default_factory=dict)
    squared_norm: float = (
        0.0  # of the penalties' gradient at risks, dummy gradients and pooled states
    )
    _counts: Tensor = field(init=False)  # rows and weights
    _own_B: dict[int, Tensor] = field(
        default_factory=dict
    )  # environments, by id of the micro-batch
    _pull_BD: dict[int, Tensor] = field(
        default_factory=dict
    )  # CORAL's gradient at its pooled states

    def __post_init__(self) -> None:
        zeros = torch.zeros(2, self.num_environments, dtype=torch.float64, device=self.device)
        self._counts = zeros
        self.weight_E, self.used_E = zeros[1], zeros[1] > 0

    def add(self, micro: Micro, environment_B: Tensor) -> None:
        """A micro-batch, and the environment of each of its rows (-1: none)."""
        self._own_B[id(micro)] = environment_B
        self._counts[0] += sum_by(
            environment_B.new_ones(len(environment_B)), environment_B, self.num_environments
        )
        self._counts[1] += self._weights(micro)

    def close(self, all_reduce: Callable[[Tensor], None]) -> None:
        """All micro-batches are there: counts over all ranks."""
        all_reduce(self._counts)
        self.weight_E = self._counts[1]
        self.used_E = (self._counts[0] >= self.min_rows) & (self.weight_E > 0)

    def holds(self, micro: Micro) -> bool:
        """Whether it was added."""
        return id(micro) in self._own_B

    def count(self, micro: Micro) -> float:
        """Its loss weight in the environments in use: its share of what all terms are divided by."""
        return float(self._weights(micro)[self.used_E].sum())

    def know(
        self,
        reads: Sequence[Read],
        queues: Mapping[int, Tensor],
        all_reduce: Callable[[Tensor], None],
        place: tuple[int, int],
    ) -> None:
        """Means over the step, and the slopes of the penalties there.

        Args:
            reads: This rank's micro-batches.
            queues: Pooled states of earlier steps by environment: constants that CORAL's sides begin with.
            all_reduce: Sums over ranks in place.
            place: This rank, and how many there are.
        """
        self.is_known = True
        sums = torch.zeros_like(self._counts)
        with torch.no_grad():
            for read in reads:
                sums += self._sums(read)
        all_reduce(sums)
        num_used = int(self.used_E.sum())
        if num_used > 1 and self.betas.get("vrex", 0.0) > 0:
            self._linearise("vrex", risk_variance, sums[0])
            risks = (sums[0] / self.weight_E.clamp_min(SMALL))[self.used_E]
            self.values["risk_gap"] = float(risks.max() - risks.min())
        if num_used and self.betas.get("irm", 0.0) > 0:
            self._linearise("irm", lambda means_E: means_E.square().mean(), sums[1])
        if self.betas.get("coral", 0.0) > 0:
            self._know_coral(reads, queues, all_reduce, place)

    def numerators(self, read: Read) -> dict[str, Tensor]:
        """Each penalty's part of this micro-batch, to be divided by the step's `count`; without coefficients."""
        own_E = self._weights(read.micro)
        sums = self._sums(read)
        parts = {
            name: linear.numerator(sums[0 if name == "vrex" else 1], own_E, self.used_E)
            for name, linear in self.linear.items()
        }
        if self.coral_value is not None and read.states_BD is not None:
            pull_BD = self._pull_BD[id(read.micro)]
            moved = (pull_BD * (read.states_BD - read.states_BD.detach())).sum()
            total = self.weight_E[self.used_E].sum()
            parts["coral"] = total * moved + self.coral_value * own_E[self.used_E].sum()
        return parts

    def _weights(self, micro: Micro) -> Tensor:
        own_N = self._own_B[id(micro)][micro.row_of_N]
        return sum_by(micro.weights_N, own_N, self.num_environments)

    def _sums(self, read: Read) -> Tensor:
        """Weighted nats (of V-REx) and dummy gradients (of IRM) by environment."""
        micro, logits_NV = read.micro, widened(read.logits_NV)
        own_N = self._own_B[id(micro)][micro.row_of_N]
        values = []
        for name in ("vrex", "irm"):
            if self.betas.get(name, 0.0) <= 0:
                values.append(torch.zeros_like(self.weight_E))
                continue
            each_N = (
                F.cross_entropy(logits_NV, micro.targets_N, reduction="none")
                if name == "vrex"
                else dummy_gradients(logits_NV, micro.targets_N)
            )
            values.append(sum_by(each_N * micro.weights_N, own_N, self.num_environments))
        return torch.stack(values)

    def _linearise(self, name: str, function: Callable[[Tensor], Tensor], sums_E: Tensor) -> None:
        made = Linearised.of(function, sums_E, self.weight_E, self.used_E)
        self.linear[name] = made
        self.values[name] = float(made.value)
        self.squared_norm += self.betas[name] ** 2 * float(made.slope_E.square().sum())

    def _know_coral(
        self,
        reads: Sequence[Read],
        queues: Mapping[int, Tensor],
        all_reduce: Callable[[Tensor], None],
        place: tuple[int, int],
    ) -> None:
        """CORAL of the step's pooled states, gathered over ranks, and its gradient at each of them."""
        own = [r.states_BD.detach() for r in reads if r.states_BD is not None]
        environments = [self._own_B[id(read.micro)] for read in reads]
        states, labels, start = _gather(own, environments, all_reduce, place, self.device)
        leaf = states.clone().requires_grad_()
        sides = []
        with torch.enable_grad():
            for environment in torch.unique(labels[labels >= 0]).tolist():
                self.fresh[environment] = states[labels == environment]
                before = [queues[environment].to(leaf)] if environment in queues else []
                side = torch.cat([*before, leaf[labels == environment]])
                if len(side) >= CORAL_ROWS:
                    sides.append(side)
            if len(sides) < 2:
                return
            value = mean_coral(sides)
        (pulls,) = torch.autograd.grad(value, leaf)
        self.coral_value = value.detach()
        self.values["coral"] = float(self.coral_value)
        self.squared_norm += self.betas["coral"] ** 2 * float(pulls.square().sum())
        for read, labels_B in zip(reads, environments, strict=True):
            self._pull_BD[id(read.micro)] = pulls[start : start + len(labels_B)]
            start += len(labels_B)


def _gather(
    states: Sequence[Tensor],
    labels: Sequence[Tensor],
    all_reduce: Callable[[Tensor], None],
    place: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """Rows of all ranks in the order of the ranks, and where this rank's begin; by sums, so any backend will do."""
    rank, world_size = place
    if world_size == 1:
        return torch.cat(list(states)), torch.cat(list(labels)), 0
    facts = torch.zeros(world_size, 2, dtype=torch.int64, device=device)
    facts[rank, 0] = sum(len(part) for part in states)
    facts[rank, 1] = states[0].shape[1] if states else 0
    all_reduce(facts)
    counts, width = facts[:, 0].tolist(), int(facts[:, 1].max())
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    kind = states[0].dtype if states else torch.float32
    # A rank without rows still takes part, and in the type of the others.
    is_double = torch.tensor(float(kind == torch.float64), device=device)
    all_reduce(is_double)
    everything = torch.zeros(
        sum(counts), width, dtype=torch.float64 if is_double > 0 else torch.float32, device=device
    )
    places = torch.zeros(sum(counts), dtype=torch.int64, device=device)
    if states:
        everything[own], places[own] = (
            torch.cat(list(states)).to(everything),
            torch.cat(list(labels)),
        )
    all_reduce(everything)
    all_reduce(places)
    return everything, places, start
