"""The line from the base to the weights of now."""

from collections.abc import Mapping

import torch
from torch import nn

from app.domain.runplan import BasePlan
from workers.export.interpolate import Interpolation
from workers.training.models import load_base


def line_from_base(
    model: nn.Module, params: Mapping[str, nn.Parameter], base: BasePlan, *, is_lora: bool
) -> Interpolation:
    """The line that ends at the weights of now; full weights are read again from the base's files.

    Raises:
        TrainingFailed: The adapter's change is not linear in a scale (`not_interpolable`).
    """
    if is_lora:
        return Interpolation.of_adapter(model)
    start = load_base(base, torch.device("cpu"), next(iter(params.values())).dtype)
    return Interpolation.of_weights(params, dict(start.named_parameters()))
