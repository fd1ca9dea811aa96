"""Freezing of the bottom layers: what is not trained is not forgotten."""

import math
from collections.abc import Mapping
from typing import ClassVar

from workers.strategies.base import Cost, Strategy
from workers.strategies.context import Context
from workers.strategies.depth import find_layers, layer_depths

ROUNDING = 1e-9  # 0.3 of 10 layers are 3, whatever the floats say


class Freeze(Strategy):
    """The lowest floor(strength * L) of L decoder layers don't move; the top one always learns.

    The share at which the run starts is taken out of training for good: no gradient, no optimiser state.
    What the controller freezes beyond it keeps its optimiser state and is held still from the next step
    on, until the strength is lowered again.

    Args:
        embeddings: Whether embedding tables are frozen together with the first layer.
    """

    kind: ClassVar[str] = "freeze"

    def __init__(self, *, embeddings: bool = True) -> None:
        self.embeddings = embeddings
        self._start_strength: float | None = None
        self._num_layers = 0
        self._depths: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # of what the task would train
        self._last: dict[str, float] = {}

    def cost(self) -> Cost:
        """Nothing: it saves."""
        return Cost()

    def edit_trainable(self, ctx: Context, names: frozenset[str]) -> frozenset[str]:
        """Takes out the share at which the run started, in every task.

        Raises:
            ValueError: The model has no stack of layers, or nothing would be left to train.
        """
        if self._start_strength is None:
            self._start_strength = ctx.strength(self.kind)
        _, self._num_layers = find_layers(ctx.model, ctx.num_layers)
        self._depths = layer_depths(ctx.model, ctx.num_layers)
        self._sizes = {n: p.numel() for n, p in ctx.model.named_parameters() if n in names}
        left = names - self._frozen(self._start_strength)
        if not left:
            raise ValueError("freeze leaves none of the weights that this stage trains")
        return left

    def on_step_start(self, ctx: Context) -> None:
        """Counts what stays as it is in this step."""
        strength = max(ctx.strength(self.kind), self._start_strength or 0.0)
        sizes = [self._sizes.get(name, 0) for name in self._frozen(strength)]
        self._last = {
            "frozen_layers": float(self._count(strength)),
            "frozen_parameters": float(sum(sizes)),
        }

    def held(self, ctx: Context) -> frozenset[str]:
        """What was frozen since the run began: it still is among the task's parameters."""
        return self._frozen(ctx.strength(self.kind)) & ctx.params.keys()

    def metrics(self) -> Mapping[str, float]:
        """`frozen_layers`, and `frozen_parameters` that the task would train without it."""
        return self._last or {"frozen_layers": 0.0, "frozen_parameters": 0.0}

    def _count(self, strength: float) -> int:
        wanted = math.floor(strength * self._num_layers + ROUNDING)
        return min(wanted, self._num_layers - 1)

    def _frozen(self, strength: float) -> frozenset[str]:
        """Parameters of the whole model that this strength freezes."""
        if strength <= 0:
            return frozenset()
        lowest = 0 if self.embeddings else 1
        return frozenset(
            name for name, depth in self._depths.items() if lowest <= depth <= self._count(strength)
        )
