"""WiSE-FT: the line from the base weights to the tuned ones, theta(a) = (1 - a) theta0 + a theta1."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from app.errors import TrainingFailed
from workers.export.bottleneck import BottleneckModel
from workers.export.merge import adapted_layers


class Interpolation:
    """Sets a live model to points of the line that ends at its weights of now.

    `set(1)` gives the tuned weights and `set(0)` the base ones, both bit for bit. Used as a context, the
    tuned weights are back afterwards.

    Args:
        points: For each parameter its tuned value, and its base value where that is not zero.
    """

    def __init__(self, points: Mapping[nn.Parameter, tuple[Tensor, Tensor | None]]) -> None:
        self._points = dict(points)
        self.alpha = 1.0

    @classmethod
    def of_adapter(cls, model: nn.Module, adapter: str = "default") -> Self:
        """For plain LoRA: the change is linear in `lora_B`, so scaling that is exact (Wortsman 2021, card 3).

        Raises:
            TrainingFailed: The adapter changes more than that; code `not_interpolable`.
        """
        return cls.of_adapters(model, [adapter])

    @classmethod
    def of_adapters(cls, model: nn.Module, adapters: Sequence[str]) -> Self:
        """For adapters that act together, plain LoRA or bottlenecks: all of them are scaled alike.

        A bottleneck's output is linear in `up`, so the line is one in its function of a block's output.

        Raises:
            TrainingFailed: One of them changes more than that; code `not_interpolable`.
        """
        factors: list[nn.Parameter] = []
        for adapter in adapters:
            if isinstance(model, BottleneckModel):
                factors += [bottleneck.up for bottleneck in model.adapter(adapter).values()]
            else:
                layers = adapted_layers(model, adapter, "not_interpolable")
                factors += [layer.lora_B[adapter].weight for layer in layers.values()]
        return cls({factor: (factor.detach().clone(), None) for factor in factors})

    @classmethod
    def of_weights(cls, params: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> Self:
        """For full fine-tuning.

        Args:
            params: Trained parameters by name; frozen ones are the same at every point.
            base: Their values before, on any device.

        Raises:
            TrainingFailed: A parameter has no base value of its shape; code `not_interpolable`.
        """
        for name, parameter in params.items():
            if name not in base or base[name].shape != parameter.shape:
                raise TrainingFailed(
                    f"{name}: the base model has no such weight of shape {tuple(parameter.shape)}",
                    None,
                    "not_interpolable",
                )
        return cls(
            {
                p: (p.detach().to("cpu", copy=True), base[name].detach())
                for name, p in params.items()
            }
        )

    def joined(self, other: "Interpolation") -> Self:
        """One line through the points of both, which move no parameter in common."""
        return type(self)(self._points | other._points)

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Sets the weights to the point `alpha`, from 0 (base) to 1 (tuned)."""
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: {alpha} is not between 0 and 1")
        for parameter, (tuned, base) in self._points.items():
            parameter.copy_(_blend(tuned, base, alpha))
        self.alpha = alpha

    def restore(self) -> None:
        """Back to the tuned weights."""
        self.set(1.0)

    def over(self, alphas: Iterable[float], measure: Callable[[float], Any]) -> dict[float, Any]:
        """What `measure` returns at each point; the tuned weights are back afterwards."""
        with self:
            found = {}
            for alpha in alphas:
                self.set(alpha)
                found[alpha] = measure(alpha)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _blend(tuned: Tensor, base: Tensor | None, alpha: float) -> Tensor:
    if alpha == 1.0:
        return tuned
    if base is None:
        return tuned * alpha
    if alpha == 0.0:
        return base
    return torch.lerp(base.to("cpu", torch.float32), tuned.float(), alpha)
