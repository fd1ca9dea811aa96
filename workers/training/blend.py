"""The line from the base to the weights of now."""

from collections.abc import Mapping

import torch
from torch import nn

from app.domain.runplan import BasePlan
from workers.export.interpolate import Interpolation
from workers.export.merge import active_adapters, base_name, is_adapter_weight
from workers.training.models import load_base


def line_from_base(
    model: nn.Module, params: Mapping[str, nn.Parameter], base: BasePlan, *, is_lora: bool
) -> Interpolation:
    """The line that ends at the weights of now; full weights are read again from the base's files.

    Adapters are scaled by the point, those alone that are active. Where the backbone was trained, too, and an
    adapter late, a point is (1 - a) W0 + a W1 + a scale B A.

    Args:
        model: Of the run.
        params: What the run trains, by name.
        base: Where the run started.
        is_lora: Whether the backbone is frozen.

    Raises:
        TrainingFailed: An adapter's change is not linear in a scale (`not_interpolable`).
    """
    active = active_adapters(model)
    if is_lora:
        return Interpolation.of_adapters(model, active)
    start = load_base(base, torch.device("cpu"), next(iter(params.values())).dtype)
    backbone = {base_name(n): p for n, p in params.items() if not is_adapter_weight(n)}
    line = Interpolation.of_weights(backbone, dict(start.named_parameters()))
    return line.joined(Interpolation.of_adapters(model, active)) if active else line
