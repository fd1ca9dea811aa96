"""What the quadratic anchors share: the pull toward starting weights, as a step, a gradient, or on adapters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from workers.strategies.base import (
    Context,
    Pull,
    StateDict,
    Strategy,
    Tally,
    check_tensors,
)
from workers.strategies.penalties import (
    add_lora_gradient,
    add_pull_gradients,
    lora_penalty,
    wide_type,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
        self._expected: dict[str, torch.Size] | None = None

    def expected_importance(self, ctx: Context) -> "dict[str, torch.Size]":
        """Names and shapes that the importance has in this run."""
        return {}

    def edit_param_groups(self, ctx: Context, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Changes nothing; notes which names a saved state must have."""
        self._expected = self.expected_importance(ctx)
        if not ctx.lora_pairs:
            self._expected |= {f"anchor/{name}": p.shape for name, p in ctx.params.items()}
        return groups

    def take_anchor(self, ctx: Context) -> None:
        """Copies the weights as they are; adapters need no copy, theirs is no change at all."""
        if not ctx.lora_pairs:
            self.anchor = {
                name: p.detach().to(wide_type(p), copy=True) for name, p in ctx.params.items()
            }

    def on_step_start(self, ctx: Context) -> None:
        """Decides whether this step is measured."""
        self._measured = self._tally.begin(ctx.step, ctx.strength(self.kind))

    def add_grads(self, ctx: Context) -> None:
        """Adds the penalty's gradient, in gradient mode or with adapters."""
        strength = ctx.strength(self.kind)
        if strength <= 0:
            return
        for pair in ctx.lora_pairs:
            penalty = lora_penalty(
                pair.lora_A.detach(),
                pair.lora_B.detach(),
                pair.scale,
                rows_O=self.importance.get(f"rows/{pair.name}"),
                columns_I=self.importance.get(f"columns/{pair.name}"),
            )
            add_lora_gradient(
                pair.lora_A, pair.lora_B, penalty, strength, self._measured, rho=self.rho
            )
        if self.penalty_mode == "gradient":
            add_pull_gradients(ctx.params, self._pulls(strength), rho=self.rho)

    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """The pulls of implicit mode."""
        strength = ctx.strength(self.kind)
        if strength <= 0 or self.penalty_mode != "implicit":
            return {}
        return self._pulls(strength)

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
            check_tensors(self.kind, tensors, self._expected)
        prefix = "anchor/"
        self.anchor = {
            n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
        }
        self.importance = {n: t for n, t in tensors.items() if not n.startswith(prefix)}

    def _pulls(self, strength: float) -> dict[str, Pull]:
        return {
            name: Pull(strength, self.importance.get(f"importance/{name}"), anchor, self._measured)
            for name, anchor in self.anchor.items()
        }
