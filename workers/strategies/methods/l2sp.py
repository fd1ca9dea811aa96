"""L2-SP (Li 2018): a quadratic anchor at the starting weights, all parameters alike."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from workers.strategies.base import Context, Cost, Pull, StateDict, Strategy
from workers.strategies.penalties import factored_gradients, quadratic_gradient, wide


class L2Sp(Strategy):
    """strength / 2 * |theta - theta0|^2; with adapters strength / 2 * |dW|_F^2 of the effective change.

    Args:
        penalty_mode: `gradient` adds the pull to the gradient (inside clipping and Adam); `implicit` is a
            decoupled step after the optimiser. Adapters always use the gradient.
    """

    kind = "l2sp"

    def __init__(self, *, penalty_mode: Literal["implicit", "gradient"] = "gradient") -> None:
        self._mode = penalty_mode
        self._anchor: dict[str, Tensor] = {}
        self._applied_sq: Tensor | None = None

    def cost(self) -> Cost:
        """A copy of what is trained."""
        return Cost(step_share=0.01, trainable_copies=1.0)

    def on_task_start(self, ctx: Context) -> None:
        """Keeps the starting weights; adapters start at no change and need no copy."""
        if not ctx.lora_pairs:
            self._anchor = {n: wide(p.detach()).clone() for n, p in ctx.params.items()}

    def on_step_start(self, ctx: Context) -> None:
        """Empties the meter."""
        self._applied_sq = None

    def add_grads(self, ctx: Context) -> None:
        """strength * (theta - theta0), or its form on the effective change."""
        strength = ctx.strength(self.kind)
        if strength == 0 or (self._mode == "implicit" and not ctx.lora_pairs):
            return
        self._applied_sq = torch.zeros((), device=ctx.device)
        if ctx.lora_pairs:
            for pair in ctx.lora_pairs:
                for factor, gradient in zip(
                    (pair.lora_A, pair.lora_B), factored_gradients(pair, None, None), strict=True
                ):
                    self._add(factor, gradient.mul_(strength))
            return
        for name, parameter in ctx.params.items():
            pull = quadratic_gradient(parameter.detach(), self._anchor[name], None)
            self._add(parameter, pull.mul_(strength))

    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """The same pull as an implicit step."""
        strength = ctx.strength(self.kind)
        if strength == 0 or self._mode == "gradient" or ctx.lora_pairs:
            return {}
        self._applied_sq = torch.zeros((), device=ctx.device)
        return {
            name: Pull(strength, None, anchor, self._applied_sq)
            for name, anchor in self._anchor.items()
        }

    def metrics(self) -> Mapping[str, float]:
        """Norm of what was added to the gradient, or of the displacement by the implicit step."""
        applied = 0.0 if self._applied_sq is None else float(self._applied_sq) ** 0.5
        return {"applied_norm": applied}

    def state_dict(self) -> StateDict:
        """The anchor."""
        return super().state_dict() | {"tensors": dict(self._anchor)}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up the anchor."""
        super().load_state_dict(state)
        self._anchor = {name: wide(tensor) for name, tensor in state["tensors"].items()}

    def _add(self, parameter: torch.nn.Parameter, gradient: Tensor) -> None:
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if self._applied_sq is not None:
            self._applied_sq += gradient.float().square().sum()
