"""Penalties that ask for invariance: consistency of pairs, V-REx, IRMv1 and CORAL, as functions of tensors."""

# Shape letters: B rows, T tokens, D width, E environments, N positions, V vocabulary, P pairs, R rows of a side.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.base import Micro

SMALL = 1e-12
CORAL_ROWS = 32  # a side: fewer give no covariance worth the name
_MASK = 2**64 - 1


def uniform_of(*numbers: int) -> float:
    """A number in [0, 1) that follows from the integers alone (splitmix64 over them).

    A draw that has no state: micro-batches, ranks and resumes don't matter.
    """
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / float(1 << 53)


def widened(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pool(micro: Micro, hidden_BTD: Tensor, *, last: bool) -> Tensor:
    """Each row's hidden states (B, D): their mean, or the last one.

    A row counts up to its last supervised position: what follows is padding, or text that nothing is learned
    from. A row without one gives its first state.
    """
    rows, width = micro.input_ids_BT.shape
    ends_B = torch.zeros(rows, dtype=torch.int64, device=hidden_BTD.device)
    ends_B.scatter_reduce_(0, micro.row_of_N, micro.positions_N % width, "amax")
    wide_BTD = widened(hidden_BTD)
    if last:
        return wide_BTD[torch.arange(rows, device=ends_B.device), ends_B]
    columns_T = torch.arange(width, device=ends_B.device)
    mask_BT = (columns_T[None] <= ends_B[:, None]).to(wide_BTD.dtype)
    return (wide_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


def consistency(left_PD: Tensor, right_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over pairs of 1 - cos(left, right), and the squared norm of its gradient.

    Symmetric with stop-gradients: half of 1 - cos(left, sg right) and half of 1 - cos(sg left, right), so that
    each side is pulled toward the other as it stands. Equal sides give 0 and no gradient.
    """
    one_way_P = F.cosine_similarity(left_PD, right_PD.detach(), dim=-1)
    other_way_P = F.cosine_similarity(left_PD.detach(), right_PD, dim=-1)
    with torch.no_grad():  # d cos / d h has norm sin / |h|
        sine_sq_P = (1 - one_way_P**2).clamp_min(0)
        inverse_sq_P = sum(1 / h.square().sum(-1).clamp_min(SMALL) for h in (left_PD, right_PD))
        squared_norm = (0.25 * sine_sq_P * inverse_sq_P).sum()
    return (1 - 0.5 * (one_way_P + other_way_P)).sum(), squared_norm


def risk_variance(risks_E: Tensor) -> Tensor:
    """V-REx (Krueger 2021, eq. 7): the population variance of the environments' risks.

    Its derivative is 2 (L_e - mean) / E.
    """
    return (risks_E - risks_E.mean()).square().mean()


def dummy_gradients(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """d/dw of the cross-entropy of w * logits at w = 1, at each position: E_q[z] - z_target.

    The square of its mean over an environment is the penalty of IRMv1 (Arjovsky 2019, eq. 3): this closed
    form needs no second derivative.
    """
    logits_NV = widened(logits_NV)
    expected_N = (logits_NV.softmax(-1) * logits_NV).sum(-1)
    return expected_N - logits_NV.gather(-1, targets_N[:, None]).squeeze(-1)


def coral(left_RD: Tensor, right_RD: Tensor) -> Tensor:
    """|C_left - C_right|_F^2 / (4 D^2) + |m_left - m_right|^2 / D (Sun 2016, eq. 1, and the means).

    The covariances alone don't see that one side is shifted. At least two rows a side.
    """
    width = left_RD.shape[1]
    gap = covariance_gap(left_RD, right_RD)
    means = (left_RD.mean(0) - right_RD.mean(0)).square().sum() / width
    return gap + means


def covariance_gap(left_RD: Tensor, right_RD: Tensor) -> Tensor:
    """|C_left - C_right|_F^2 / (4 D^2), covariances with n - 1."""
    difference = _covariance(left_RD) - _covariance(right_RD)
    return difference.square().sum() / (4 * left_RD.shape[1] ** 2)


def mean_coral(sides: Sequence[Tensor]) -> Tensor:
    """The mean of `coral` over all pairs of environments."""
    values = [
        coral(sides[i], sides[j]) for i in range(len(sides)) for j in range(i + 1, len(sides))
    ]
    return torch.stack(values).mean()


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


def _covariance(values_RD: Tensor) -> Tensor:
    centred = values_RD - values_RD.mean(0)
    return centred.T @ centred / (values_RD.shape[0] - 1)
