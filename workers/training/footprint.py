"""What training holds in memory: weights, gradients and the optimiser's moments, in bytes."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from workers.training.loop import Run

MOMENTS = 2  # of AdamW, in the parameter's own type


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that last from step to step or live through a step; activations depend on the rows and don't count."""

    weights: int  # of the whole model, frozen or not
    gradients: int  # of what the task at hand trains
    moments: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.moments

    def saving(self, other: "Footprint") -> float:
        """How far this lies below another, as a share of it."""
        return 1.0 - self.total / other.total


def measure_footprint(run: Run) -> Footprint:
    """Counts a run's tensors; before its first step the moments are those that AdamW will have.

    Args:
        run: Any; a copy of the base that serves as a teacher is not of it.
    """
    moments = [
        value
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    trained = list(run.ctx.params.values())
    return Footprint(
        weights=_bytes(run.model.parameters()),
        gradients=_bytes(trained),
        moments=_bytes(moments) if moments else MOMENTS * _bytes(trained),
    )


def expected_footprint(model: nn.Module) -> Footprint:
    """Of training everything in a model that requires a gradient, by AdamW."""
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    return Footprint(_bytes(model.parameters()), trained, MOMENTS * trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
