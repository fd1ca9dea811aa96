"""What the quadratic anchors share: the pull toward starting weights, and toward the ends of tasks."""

# Shape letters: R rank of an adapter, I inputs and O outputs of a linear layer.

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from workers.strategies.base import Cost, Needs, StateDict, Strategy, check_tensors
from workers.strategies.context import Context, LoraPair
from workers.strategies.importance import (
    GENERAL,
    Normalize,
    clip_at_quantile,
    normalize_importance,
    task_store,
)
from workers.strategies.penalties import (
    LoraPenalty,
    add_lora_gradient,
    add_pull_gradients,
    lora_penalty,
    wide_type,
)
from workers.strategies.pulls import Pull, Tally

AnchorPlace = Literal["base", "latest"]


class QuadraticAnchor(Strategy):
    """Penalty strength / 2 * sum of importance * (theta - anchor)^2; a subclass says what is important.

    With adapters it is on the effective change of each adapted weight, anchored at the frozen base weight,
    with the importance as an outer product. No importance means 1 everywhere.

    Args:
        penalty_mode: `implicit` takes a decoupled step that is stable for any strength; `gradient` adds the
            penalty's gradient before clipping. Adapters always use the gradient.
        rho: In gradient mode the pull of a block is at most so many times its task gradient; None is off.
    """

    def __init__(self, penalty_mode: Literal["implicit", "gradient"], rho: float | None) -> None:
        self.penalty_mode = penalty_mode
        self.rho = rho
        #: By `importance/<parameter>`, or `rows/<layer>` and `columns/<layer>` with adapters.
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._tally = Tally()
        self._measured: Tally | None = None  # the tally in a step that is measured
        self._expected: dict[str, torch.Size] | None = None  # of the task at hand
        self._known: frozenset[str] = frozenset()  # parameters and adapted layers of all tasks

    def expected_importance(self, ctx: Context) -> "dict[str, torch.Size]":
        """Names and shapes that the importance has in this run."""
        return {}

    def expected_state(self, ctx: Context) -> dict[str, torch.Size]:
        """Names and shapes that a saved state must have: importance and anchor."""
        expected = self.expected_importance(ctx)
        if not ctx.lora_pairs:
            expected |= {f"anchor/{name}": p.shape for name, p in ctx.params.items()}
        return expected

    def edit_param_groups(self, ctx: Context, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Changes nothing; notes which names a saved state must have, and which it may have."""
        self._expected = self.expected_state(ctx)
        names = (name for name, _ in ctx.model.named_parameters())
        self._known = frozenset(names).union(ctx.params, (pair.name for pair in ctx.lora_pairs))
        return groups

    def take_anchor(self, ctx: Context) -> None:
        """Copies the weights that have none yet; adapters need no copy, theirs is no change at all.

        A later task finds the anchor that the first one took: what was added since is not where the job
        started.
        """
        if not ctx.lora_pairs:
            for name, p in ctx.params.items():
                if name not in self.anchor:
                    self.anchor[name] = p.detach().to(wide_type(p), copy=True)

    def on_step_start(self, ctx: Context) -> None:
        """Decides whether this step is measured."""
        self._measured = self._tally.begin(ctx.step, ctx.strength(self.kind))

    def add_grads(self, ctx: Context) -> None:
        """Adds the penalty's gradient, in gradient mode or with adapters."""
        strength = ctx.strength(self.kind)
        if strength <= 0:
            return
        for pair in ctx.lora_pairs:
            penalty = self.pair_penalty(pair)
            add_lora_gradient(
                pair.lora_A, pair.lora_B, penalty, strength, self._measured, rho=self.rho
            )
        if self.penalty_mode == "gradient":
            add_pull_gradients(ctx.params, self._pulls(ctx, strength), rho=self.rho)

    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """The pulls of implicit mode."""
        strength = ctx.strength(self.kind)
        if strength <= 0 or self.penalty_mode != "implicit":
            return {}
        return self._pulls(ctx, strength)

    def pair_penalty(self, pair: LoraPair) -> LoraPenalty:
        """The penalty of one adapted layer for strength 1, and its gradients."""
        return lora_penalty(
            pair.lora_A.detach(),
            pair.lora_B.detach(),
            pair.scale,
            rows_O=self.importance.get(f"rows/{pair.name}"),
            columns_I=self.importance.get(f"columns/{pair.name}"),
        )

    def metrics(self) -> Mapping[str, float]:
        """Of the last measured step: `applied_norm` of the displacement (implicit) or of the added gradient,
        `penalty`, its value, and `capped_share`, that of the blocks where the cap bound.
        """
        return self._tally.read()

    def state_dict(self) -> StateDict:
        """Importance and anchor."""
        anchors = {f"anchor/{name}": anchor for name, anchor in self.anchor.items()}
        tensors = {**self.importance, **anchors}
        scalars = {"measured": self._tally.save()}
        return {**super().state_dict(), "tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved importance and anchor.

        Raises:
            ValueError: They do not fit the run.
        """
        super().load_state_dict(state)
        self._tally = Tally(last=dict(state["scalars"]["measured"]))
        tensors = {name: tensor.detach().clone() for name, tensor in state["tensors"].items()}
        if self._expected is not None:
            others = {
                name: tensor.shape
                for name, tensor in tensors.items()
                if self.may_hold(name) and name not in self._expected
            }
            check_tensors(self.kind, tensors, self._expected | others)
        prefix = "anchor/"
        self.anchor = {
            n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
        }
        self.importance = {n: t for n, t in tensors.items() if not n.startswith(prefix)}

    def may_hold(self, name: str) -> bool:
        """Whether a saved tensor beside those expected belongs to a weight that another task trains."""
        kind, _, weight = name.partition("/")
        return kind in ("importance", "anchor") and weight in self._known

    def _pulls(self, ctx: Context, strength: float) -> dict[str, Pull]:
        return {
            name: Pull(strength, self.importance.get(f"importance/{name}"), anchor, self._measured)
            for name, anchor in self.anchor.items()
            if name in ctx.params
        }


class SequenceAnchor(QuadraticAnchor):
    """A quadratic anchor at the starting model, to which the end of every finished task adds one.

    With F_0, a_0 the importance and weights of the starting model and F_k, a_k those at the end of task k,
    `anchor: base` is the sum of quadratics F_0 (theta - a_0)^2 + sum_k gamma^(K - k) F_k (theta - a_k)^2.
    All weights trained, it is kept as one: its curvature is the sum of the importances and its anchor
    their weighted mean. `anchor: latest` is online EWC: all importances decay and the one anchor moves along.

    With adapters every finished task keeps its two factors of importance and its adapter; the distance
    of two adapters is that of their effective changes, so the sum is exact there, too.

    Args:
        penalty_mode: As for any quadratic anchor.
        rho: As for any quadratic anchor.
        samples: General rows that are read, and rows of each finished task.
        normalize: What over all weights is scaled to be 1.
        clip: Quantile above which an importance is cut off, before it is normalised; 1 is off.
        place: Where the anchor is.
        online: Whether finished tasks are anchored, too.
        gamma: Decay of the finished tasks' importance; with `latest` of all former ones.
    """

    def __init__(  # noqa: PLR0913 - the fields of a configuration
        self,
        penalty_mode: Literal["implicit", "gradient"],
        rho: float | None,
        *,
        samples: int,
        normalize: Normalize,
        clip: float,
        place: AnchorPlace,
        online: bool,
        gamma: float,
    ) -> None:
        super().__init__(penalty_mode, rho)
        self.samples = samples
        self.normalize: Normalize = normalize
        self.clip = clip
        self.place = place
        self.online = online
        self.gamma = gamma
        #: F_0 and a_0, under the names of the whole; empty until a task has been added to them.
        self.general: dict[str, Tensor] = {}

    @abstractmethod
    def measure(
        self, ctx: Context, store: str, rows: Sequence[int], seed: int, only: frozenset[str]
    ) -> dict[str, Tensor]:
        """The importance of these parameters or layers on rows of a store, neither clipped nor normalised."""

    @abstractmethod
    def cache_key(self, num_rows: int) -> str:
        """What the starting model's importance follows from, beside model and rows."""

    def cost(self) -> Cost:
        """A pass over the parameters in each step, importance and anchor."""
        return Cost(step_share=0.02, trainable_copies=2.0)

    def needs(self) -> Needs:
        """General rows, and with adapters that the frozen base is what they are added to."""
        return Needs(general_rows=True, base_unmodified=True)

    def expected_importance(self, ctx: Context) -> dict[str, torch.Size]:
        """The importance of each weight, or its factors with adapters."""
        if not ctx.lora_pairs:
            return {f"importance/{name}": p.shape for name, p in ctx.params.items()}
        shapes = {}
        for pair in ctx.lora_pairs:
            outputs, inputs = pair.base_weight.shape
            shapes[f"rows/{pair.name}"] = torch.Size((outputs,))
            shapes[f"columns/{pair.name}"] = torch.Size((inputs,))
        return shapes

    def on_task_start(self, ctx: Context) -> None:
        """Measures on general rows what no task trained before, and takes its anchor there."""
        if ctx.num_general_rows == 0:
            raise ValueError(f"{self.kind}: there are no general rows to measure importance on")
        names = [pair.name for pair in ctx.lora_pairs] or list(ctx.params)
        prefix = "rows" if ctx.lora_pairs else "importance"
        missing = frozenset(n for n in names if f"{prefix}/{n}" not in self.importance)
        if missing:
            rows, seed = self._draw(ctx, ctx.num_general_rows)

            def measure() -> dict[str, Tensor]:
                return self.measure(ctx, GENERAL, rows, seed, missing)

            is_shared = (
                not self.importance and ctx.task_index == 0
            )  # else other jobs have no use of it
            found = ctx.cached(self.cache_key(len(rows)), measure) if is_shared else measure()
            self.importance |= self._scaled(found)
        self.take_anchor(ctx)

    def on_task_end(self, ctx: Context) -> None:
        """Adds the end of this task to what holds in the next ones; nothing comes after the last."""
        if not self.online or ctx.task_index + 1 >= ctx.num_tasks:
            return
        rows, seed = self._draw(ctx, ctx.num_training_rows)
        names = frozenset([pair.name for pair in ctx.lora_pairs] or ctx.params)
        self.consolidate(ctx, self._scaled(self.measure(ctx, task_store(ctx), rows, seed, names)))

    def consolidate(self, ctx: Context, importance: Mapping[str, Tensor]) -> None:
        """Adds an importance, anchored at the weights as they are."""
        if ctx.lora_pairs:
            self._add_factors(ctx, importance)
            return
        decay = self.gamma
        if self.place == "base" and decay < 1:
            kept = {n: t for n, t in self._tensors().items() if n not in self.general}
            self.general |= kept  # nothing is copied: the whole gets new tensors below
        for name, new in importance.items():
            weight = name.removeprefix("importance/")
            theta = ctx.params[weight].detach().to(new.dtype)
            if name not in self.importance:
                self.importance[name], self.anchor[weight] = new, theta.clone()
                continue
            total = decay * self.importance[name] + new
            if self.place == "base":
                shift = decay * self.importance[name] * (self.anchor[weight] - theta)
                if decay < 1:
                    first = (1 - decay) * self.general[name]
                    total += first
                    shift += first * (self.general[f"anchor/{weight}"] - theta)
                tiny = torch.finfo(total.dtype).tiny
                self.anchor[weight] = theta + shift / total.clamp(min=tiny)
            else:
                self.anchor[weight] = theta.clone()
            self.importance[name] = total

    def pair_penalty(self, pair: LoraPair) -> LoraPenalty:
        """The sum over the starting model and the finished tasks."""
        parts = [_pair_penalty(pair, term) for term in self._terms(pair.name)]
        total = parts[0]
        for part in parts[1:]:
            total = LoraPenalty(*(left + right for left, right in zip(total, part, strict=True)))
        return total

    def may_hold(self, name: str) -> bool:
        """Tensors of other tasks' weights, and what finished tasks left."""
        first, _, rest = name.partition("/")
        if first == "general":
            return super().may_hold(rest)
        kind, _, _ = (rest if first.startswith("task") else name).partition("/")
        return super().may_hold(name) or kind in ("rows", "columns", "A", "B")

    def state_dict(self) -> StateDict:
        """Importance and anchor, and those of the starting model where they differ."""
        state = super().state_dict()
        general = {f"general/{name}": tensor for name, tensor in self.general.items()}
        return {**state, "tensors": {**state["tensors"], **general}}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved importance and anchor.

        Raises:
            ValueError: They do not fit the run.
        """
        super().load_state_dict(state)
        prefix = "general/"
        own = {n: t for n, t in self.importance.items() if n.startswith(prefix)}
        self.importance = {n: t for n, t in self.importance.items() if n not in own}
        self.general = {n.removeprefix(prefix): t for n, t in own.items()}

    def _draw(self, ctx: Context, available: int) -> tuple[list[int], int]:
        generator = ctx.generator(self.kind)
        order = torch.randperm(available, generator=generator)
        return sorted(order[: self.samples].tolist()), generator.initial_seed()

    def _scaled(self, importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return normalize_importance(clip_at_quantile(importance, self.clip), self.normalize)

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.importance, **{f"anchor/{n}": t for n, t in self.anchor.items()}}

    def _add_factors(self, ctx: Context, importance: Mapping[str, Tensor]) -> None:
        """Keeps a finished task's factors and adapters; the former ones decay."""
        for name in [n for n in self.importance if "rows/" in n]:
            if self.place == "latest" or name.startswith("task"):
                self.importance[name] = self.gamma * self.importance[name]
        task = f"task{ctx.task_index}"
        self.importance |= {f"{task}/{name}": value for name, value in importance.items()}
        for pair in ctx.lora_pairs:
            # One adapter for all terms where the anchor moves along.
            place = "" if self.place == "latest" else f"{task}/"
            for side, factor in (("A", pair.lora_A), ("B", pair.lora_B)):
                copy = factor.detach().to(wide_type(factor), copy=True)
                self.importance[f"{place}{side}/{pair.name}"] = copy

    def _terms(self, pair: str) -> "Iterator[_Term]":
        """The quadratics of an adapted layer: the starting model's, then those of the finished tasks."""
        ending = f"rows/{pair}"
        for name in [n for n in self.importance if n == ending or n.endswith(f"/{ending}")]:
            task = name.removesuffix(ending)
            place = "" if self.place == "latest" else task
            yield _Term(
                self.importance[name],
                self.importance[f"{task}columns/{pair}"],
                self.importance.get(f"{place}A/{pair}"),
                self.importance.get(f"{place}B/{pair}"),
            )


class _Term(NamedTuple):
    """One quadratic of an adapted layer; without an adapter it is anchored at no change."""

    rows_O: Tensor
    columns_I: Tensor
    lora_A_RI: Tensor | None
    lora_B_OR: Tensor | None


def _pair_penalty(pair: LoraPair, term: _Term) -> LoraPenalty:
    """One quadratic: the difference of two adapters' changes is that of one of twice the rank,
    scale * [B, -B'] [A; A'].
    """
    lora_A_RI, lora_B_OR = pair.lora_A.detach(), pair.lora_B.detach()
    rank = lora_A_RI.shape[0]
    if term.lora_A_RI is not None and term.lora_B_OR is not None:
        lora_A_RI = torch.cat([lora_A_RI, term.lora_A_RI.to(lora_A_RI.dtype)])
        lora_B_OR = torch.cat([lora_B_OR, -term.lora_B_OR.to(lora_B_OR.dtype)], dim=1)
    penalty = lora_penalty(
        lora_A_RI, lora_B_OR, pair.scale, rows_O=term.rows_O, columns_I=term.columns_I
    )
    return LoraPenalty(penalty.value, penalty.grad_A_RI[:rank], penalty.grad_B_OR[:, :rank])
