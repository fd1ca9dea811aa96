"""The line from the base to the tuned weights, walked in place: WiSE-FT, and for adapters a scale."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from app.domain.runplan import BasePlan
from workers.strategies.base import LoraPair
from workers.training.build import load_base


class AdapterBlend:
    """Scales the change that adapters make by scaling their `lora_B`: exact, as the change is linear in it."""

    def __init__(self, pairs: Sequence[LoraPair]) -> None:
        self._tuned = [(pair.lora_B, pair.lora_B.detach().clone()) for pair in pairs]

    def apply(self, alpha: float) -> None:
        """Sets the weights to the point `alpha`."""
        with torch.no_grad():
            for parameter, tuned in self._tuned:
                parameter.copy_(tuned * alpha)


class WeightBlend:
    """theta(alpha) = theta0 + alpha (theta - theta0), exact at both ends; theta0 is read from the base's files."""

    def __init__(self, params: Mapping[str, nn.Parameter], base: BasePlan) -> None:
        self._params = params
        self._tuned = {name: p.detach().to("cpu", copy=True) for name, p in params.items()}
        dtype = next(iter(params.values())).dtype
        start = load_base(base, torch.device("cpu"), dtype)
        self._base = {name: p.detach() for name, p in start.named_parameters()}

    def apply(self, alpha: float) -> None:
        """Sets the weights to the point `alpha`."""
        with torch.no_grad():
            for name, parameter in self._params.items():
                base, tuned = self._base[name], self._tuned[name]
                parameter.copy_(tuned if alpha == 1.0 else torch.lerp(base, tuned, alpha))


def make_blend(
    params: Mapping[str, nn.Parameter], pairs: Sequence[LoraPair], base: BasePlan
) -> AdapterBlend | WeightBlend:
    """The line that ends at the weights of now: of adapters where there are any, else of all parameters."""
    return AdapterBlend(pairs) if pairs else WeightBlend(params, base)
