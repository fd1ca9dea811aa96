"""L2-SP: a quadratic anchor at the starting weights, all parameters alike."""

from typing import ClassVar, Literal

from workers.strategies.anchors import QuadraticAnchor
from workers.strategies.base import Cost, Needs
from workers.strategies.context import Context


class L2Sp(QuadraticAnchor):
    """Pulls every parameter toward where it started: strength / 2 * |theta - theta_0|^2.

    With adapters the pull is on the effective change, strength / 2 * |scale * B A|_F^2, through its
    gradient: the anchor is the frozen base weight.

    Args:
        penalty_mode: `gradient` adds the penalty's gradient before clipping; `implicit` takes a decoupled,
            always stable step after the optimiser's.
    """

    kind: ClassVar[str] = "l2sp"

    def __init__(self, *, penalty_mode: Literal["implicit", "gradient"] = "gradient") -> None:
        super().__init__(penalty_mode, rho=None)

    def needs(self) -> Needs:
        """With adapters: that the frozen base is what they are added to."""
        return Needs(base_unmodified=True)

    def cost(self) -> Cost:
        """A pass over the parameters in each step, and the anchor."""
        return Cost(step_share=0.02, trainable_copies=1.0)

    def on_task_start(self, ctx: Context) -> None:
        """Takes the anchor."""
        self.take_anchor(ctx)
