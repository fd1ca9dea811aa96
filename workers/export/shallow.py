"""A student: a model with fewer of its teacher's layers, its other weights copied."""

import copy
from typing import Any

import torch
from torch import nn

from app.errors import TrainingFailed


def kept_layers(num_layers: int, share: float) -> tuple[int, ...]:
    """Which layers a student keeps: evenly spaced, the first and the last among them.

    Args:
        num_layers: Of the teacher.
        share: Of them to keep, above 0; at least one is kept, and from two on the first and the last are.
    """
    count = min(max(round(num_layers * share), 1), num_layers)
    if count == 1:
        return (num_layers - 1,)
    return tuple(round(k * (num_layers - 1) / (count - 1)) for k in range(count))


@torch.no_grad()
def make_student(teacher: nn.Module, share: float) -> nn.Module:
    """A model of the teacher's class with a share of its layers and copies of all its other weights.

    Args:
        teacher: A transformers causal language model without adapters.
        share: Of its layers to keep; 1 copies it.

    Raises:
        TrainingFailed: The model's layers are in no list of their own (`student_not_possible`).
    """
    source: Any = teacher
    prefix, layers = _layer_list(teacher)
    kept = kept_layers(len(layers), share)
    config = copy.deepcopy(source.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = [text.layer_types[layer] for layer in kept]
    with torch.random.fork_rng(devices=[]):
        student: nn.Module = type(source)(config)
    student = student.to(device=next(teacher.parameters()).device, dtype=source.dtype)
    weights = source.state_dict()
    renamed = {}
    for name in student.state_dict():
        taken = name
        if name.startswith(f"{prefix}."):
            place, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            taken = f"{prefix}.{kept[int(place)]}.{rest}"
        if taken not in weights:
            raise TrainingFailed(
                f"stages: the tuned model has no weight {taken} that its student could start from.",
                "stages",
                "student_not_possible",
            )
        renamed[name] = weights[taken]
    student.load_state_dict(renamed)
    return student


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers: the list that is as long as the configuration says."""
    source: Any = model
    wanted = source.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return name, module
    raise TrainingFailed(
        "stages: the tuned model's layers are in no list, so a student can't take some of them.",
        "stages",
        "student_not_possible",
    )
