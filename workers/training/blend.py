"""The line from the base to the tuned weights, walked in place: WiSE-FT, and for adapters a scale."""

import torch

from app.domain.runplan import BasePlan
from workers.training.build import load_base
from workers.training.loop import Run


class AdapterBlend:
    """Scales the change that adapters make by scaling their `lora_B`: exact, as the change is linear in it."""

    def __init__(self, run: Run) -> None:
        self._tuned = [(pair.lora_B, pair.lora_B.detach().clone()) for pair in run.ctx.lora_pairs]

    def apply(self, alpha: float) -> None:
        """Sets the weights to the point `alpha`."""
        with torch.no_grad():
            for parameter, tuned in self._tuned:
                parameter.copy_(tuned * alpha)


class WeightBlend:
    """theta(alpha) = theta0 + alpha (theta - theta0), exact at both ends; theta0 is read from the base's files."""

    def __init__(self, run: Run, base: BasePlan) -> None:
        self._params = run.ctx.params
        self._tuned = {name: p.detach().to("cpu", copy=True) for name, p in self._params.items()}
        dtype = next(iter(self._params.values())).dtype
        start = load_base(base, torch.device("cpu"), dtype)
        self._base = {name: p.detach() for name, p in start.named_parameters()}

    def apply(self, alpha: float) -> None:
        """Sets the weights to the point `alpha`."""
        with torch.no_grad():
            for name, parameter in self._params.items():
                base, tuned = self._base[name], self._tuned[name]
                point = tuned if alpha == 1.0 else torch.lerp(base, tuned, alpha)
                parameter.copy_(point)


def make_blend(run: Run, base: BasePlan) -> AdapterBlend | WeightBlend:
    """The line that ends at the run's weights of now."""
    if run.training.type == "lora":
        return AdapterBlend(run)
    return WeightBlend(run, base)
