"""L2-SP: a quadratic anchor at the starting weights, all parameters alike."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workers.strategies.base import (
    Context,
    Cost,
    Needs,
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


class L2Sp(Strategy):
    """Pulls every parameter toward where it started: strength / 2 * |theta - theta_0|^2.

    With adapters the pull is on the effective change, strength / 2 * |scale * B A|_F^2, through its
    gradient: the anchor is the frozen base weight.

    Args:
        penalty_mode: `gradient` adds the penalty's gradient before clipping; `implicit` takes a decoupled,
            always stable step after the optimiser's.
    """

    kind: ClassVar[str] = "l2sp"

    def __init__(self, *, penalty_mode: Literal["implicit", "gradient"] = "gradient") -> None:
        self.penalty_mode = penalty_mode
        self.anchor: dict[str, Tensor] = {}
        self._tally = Tally()
        self._measured: Tally | None = None  # the tally in a step that is measured
        self._expected: dict[str, torch.Size] | None = None

    def needs(self) -> Needs:
        """With adapters: that the frozen base is what they are added to."""
        return Needs(base_unmodified=True)

    def cost(self) -> Cost:
        """A pass over the parameters in each step, and the anchor."""
        return Cost(step_share=0.02, trainable_copies=1.0)

    def edit_param_groups(self, ctx: Context, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Changes nothing; notes which names a saved state must have."""
        shapes = {} if ctx.lora_pairs else {name: p.shape for name, p in ctx.params.items()}
        self._expected = {f"anchor/{name}": shape for name, shape in shapes.items()}
        return groups

    def on_task_start(self, ctx: Context) -> None:
        """Copies the starting weights; adapters need no copy, theirs is no change at all."""
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
            penalty = lora_penalty(pair.lora_A.detach(), pair.lora_B.detach(), pair.scale)
            add_lora_gradient(pair.lora_A, pair.lora_B, penalty, strength, self._measured, rho=None)
        if self.penalty_mode == "gradient":
            add_pull_gradients(ctx.params, self._pulls(strength), rho=None)

    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """The pulls of implicit mode."""
        strength = ctx.strength(self.kind)
        if strength <= 0 or self.penalty_mode != "implicit":
            return {}
        return self._pulls(strength)

    def metrics(self) -> Mapping[str, float]:
        """Of the last measured step: `applied_norm` of the displacement (implicit) or of the added
        gradient, and `penalty`, its value.
        """
        return self._tally.read()

    def state_dict(self) -> StateDict:
        """The anchor."""
        tensors = {f"anchor/{name}": anchor for name, anchor in self.anchor.items()}
        scalars = {"measured": self._tally.save()}
        return {**super().state_dict(), "tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved anchor.

        Raises:
            ValueError: It does not fit the run.
        """
        super().load_state_dict(state)
        self._tally = Tally(last=dict(state["scalars"]["measured"]))
        if self._expected is not None:
            check_tensors(self.kind, state["tensors"], self._expected)
        self.anchor = {
            name.removeprefix("anchor/"): tensor.detach().clone()
            for name, tensor in state["tensors"].items()
        }

    def _pulls(self, strength: float) -> dict[str, Pull]:
        return {name: Pull(strength, None, a, self._measured) for name, a in self.anchor.items()}
