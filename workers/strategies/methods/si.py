"""Synaptic intelligence: a quadratic anchor weighted by what each weight did for the finished tasks."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.anchors import QuadraticAnchor
from workers.strategies.base import Cost, Needs, StateDict
from workers.strategies.context import Context
from workers.strategies.importance import Normalize, clip_at_quantile, normalize_importance
from workers.strategies.penalties import wide_type

OMEGA, START = "omega", "start"


class Si(QuadraticAnchor):
    """Penalty strength / 2 * sum of Omega (theta - anchor)^2, Omega from the path of the tasks before.

    While a task trains, omega += -g * delta for every weight: g is the gradient of the step's loss before any
    penalty, projection or clipping, and delta the displacement that really happened. At the task's end
    Omega += max(omega, 0) / (Delta^2 + xi), with Delta the task's whole displacement, and the weights become
    the anchor (Zenke et al. 2017, equations 3 to 5; their c is half of the strength).

    In the first task Omega is 0, so nothing is held. What other strategies add to the loss (distillation,
    replayed rows) is in g; what they add to its gradient (anchors in gradient mode) is not.

    Args:
        penalty_mode: `implicit` takes a decoupled step that is stable for any strength; `gradient` adds the
            penalty's gradient before clipping.
        xi: Squared displacement that is added to Delta^2.
        importance_normalize: `mean` and `max` scale each task's share so that its mean or maximum over all
            weights is 1; `none` leaves the paper's scale.
        importance_clip: Quantile above which a task's share is cut off, before it is normalised; 1 is off.
        rho: In gradient mode the pull of a block is at most so many times its task gradient; None is off.
    """

    kind: ClassVar[str] = "si"

    def __init__(
        self,
        *,
        penalty_mode: Literal["implicit", "gradient"] = "implicit",
        xi: float = 1e-3,
        importance_normalize: Normalize = "mean",
        importance_clip: float = 0.999,
        rho: float | None = 5.0,
    ) -> None:
        super().__init__(penalty_mode, rho)
        self.xi = xi
        self.normalize: Normalize = importance_normalize
        self.clip = importance_clip
        self.omega: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}  # weights from before the task
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # gradient and weight, during a step

    def needs(self) -> Needs:
        """Nothing of the run: it looks at every step, also while it is turned off."""
        return Needs()

    def cost(self) -> Cost:
        """Copies of gradient and weights in each step; omega, start, importance and anchor kept."""
        return Cost(step_share=0.05, trainable_copies=6.0)

    def on_task_start(self, ctx: Context) -> None:
        """Begins the path; a last stage that trains an adapter on frozen weights has nothing to hold.

        Raises:
            ValueError: The run trains adapters from the start.
        """
        if ctx.lora_pairs and ctx.task_index == 0:
            raise ValueError(
                "si: an adapter's entries have no path of their own; it needs full tuning"
            )
        params = {} if ctx.lora_pairs else ctx.params
        self.start = {n: p.detach().to(wide_type(p), copy=True) for n, p in params.items()}
        self.omega = {name: torch.zeros_like(theta) for name, theta in self.start.items()}

    def read_grads(self, ctx: Context) -> None:
        """Keeps gradient and weights as they are before the step."""
        self._before = {
            name: (p.grad.detach().to(wide_type(p), copy=True), p.detach().clone())
            for name, p in ctx.params.items()
            if p.grad is not None and name in self.omega
        }

    def add_grads(self, ctx: Context) -> None:
        """Adds the penalty's gradient in gradient mode; none to adapters."""
        if not ctx.lora_pairs:
            super().add_grads(ctx)

    def on_step_end(self, ctx: Context) -> None:
        """Adds the step's share of the path integral."""
        for name, (grad, theta) in self._before.items():
            self.omega[name].sub_(grad.mul_(ctx.params[name].detach() - theta))
        self._before = {}

    def on_task_end(self, ctx: Context) -> None:
        """Consolidates the task; nothing comes after the last one that it would hold."""
        if ctx.task_index + 1 >= ctx.num_tasks or not self.start:
            return
        share = {}
        for name, start in self.start.items():
            moved = ctx.params[name].detach().to(start.dtype) - start
            share[f"importance/{name}"] = self.omega[name].clamp(min=0) / (moved**2 + self.xi)
            self.anchor[name] = start + moved
        share = normalize_importance(clip_at_quantile(share, self.clip), self.normalize)
        for name, value in share.items():
            former = self.importance.get(name)
            self.importance[name] = value if former is None else former + value

    def expected_state(self, ctx: Context) -> dict[str, torch.Size]:
        """The path of each weight; importance and anchor come with the first finished task."""
        params = {} if ctx.lora_pairs else ctx.params
        return {f"{kind}/{n}": p.shape for kind in (OMEGA, START) for n, p in params.items()}

    def state_dict(self) -> StateDict:
        """Importance and anchor, the path so far and where it began."""
        state = super().state_dict()
        path = {f"{OMEGA}/{name}": tensor for name, tensor in self.omega.items()}
        path |= {f"{START}/{name}": tensor for name, tensor in self.start.items()}
        return {**state, "tensors": {**state["tensors"], **path}}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved state.

        Raises:
            ValueError: It does not fit the run.
        """
        super().load_state_dict(state)
        for kind, own in ((OMEGA, self.omega), (START, self.start)):
            own.clear()
            for name in [n for n in self.importance if n.startswith(f"{kind}/")]:
                own[name.removeprefix(f"{kind}/")] = self.importance.pop(name)
