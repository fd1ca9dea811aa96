"""Optimiser groups by role and layer, and weight decay as numbers: how far a schedule shrinks, where it is capped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from workers.strategies.context import Context
from workers.strategies.depth import embedding_names, find_layers, layer_depths


class Role(StrEnum):
    """What a parameter is to a decaying optimiser; every parameter has exactly one role."""

    MATRIX = "matrix"  # of the backbone
    EMBEDDING = "embedding"  # tables and heads; a tied pair is one parameter
    VECTOR = "vector"  # norms and biases, which never decay
    ADAPTER_A = "adapter_a"
    ADAPTER_B = "adapter_b"


def parameter_roles(ctx: Context) -> dict[str, Role]:
    """The role of each parameter of the task."""
    factors = {id(pair.lora_A): Role.ADAPTER_A for pair in ctx.lora_pairs}
    factors |= {id(pair.lora_B): Role.ADAPTER_B for pair in ctx.lora_pairs}
    tables = embedding_names(ctx.model)
    model: Any = ctx.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_weight = getattr(head, "weight", None)
    roles = {}
    for name, parameter in ctx.params.items():
        if id(parameter) in factors:
            roles[name] = factors[id(parameter)]
        elif parameter.ndim < 2:
            roles[name] = Role.VECTOR
        elif name in tables or parameter is head_weight:
            roles[name] = Role.EMBEDDING
        else:
            roles[name] = Role.MATRIX
    return roles


def schedule_factors(ctx: Context) -> Tensor:
    """The schedule of the task at hand, a factor a step, float64."""
    return torch.tensor([ctx.schedule(k) for k in range(ctx.task_steps)], dtype=torch.float64)


def total_shrink(factors: Tensor, rate: float) -> float:
    """Share of the way to the anchor that decay alone goes: 1 - prod over steps of (1 - rate * factor)."""
    steps = (rate * factors).clamp(max=1.0)
    return float(-torch.expm1(torch.log1p(-steps).sum()))


def largest_rate(factors: Tensor, shrink: float) -> float:
    """The rate at which a schedule shrinks by so much in all; `shrink` between 0 and 1."""
    if not len(factors) or float(factors.max()) <= 0:
        return 1.0
    low, high = 0.0, 1.0 / float(factors.max())
    for _ in range(100):  # bisection to the last bit: the shrink grows with the rate
        middle = 0.5 * (low + high)
        if total_shrink(factors, middle) > shrink:
            high = middle
        else:
            low = middle
    return low


@dataclass
class Block:
    """Parameters that decay alike: one role at one learning rate."""

    role: Role
    names: list[str]
    base_lr: float
    owed: float = 0.0  # -log of what is still to be multiplied into the distance from the anchor


def split_groups(
    groups: Sequence[dict[str, Any]], roles: Mapping[str, Role], scales: Mapping[str, float]
) -> list[tuple[Role, dict[str, Any]]]:
    """The groups of an optimiser split by role and learning rate; those at the full rate come first.

    Args:
        groups: With `params`, `names`, `lr` and `base_lr`.
        roles: Of every parameter in them.
        scales: Learning rate of every parameter as a multiple of its group's.
    """
    split: dict[tuple[int, Role, float], dict[str, Any]] = {}
    for place, group in enumerate(groups):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            key = (place, roles[name], scales[name])
            own = split.get(key)
            if own is None:
                own = split[key] = {**group, "params": [], "names": []}
                own["lr"], own["base_lr"] = group["lr"] * key[2], group["base_lr"] * key[2]
            own["params"].append(parameter)
            own["names"].append(name)
    ordered = sorted(split.items(), key=lambda item: item[0][2] != 1.0)
    return [(role, group) for (_, role, _), group in ordered]


def layer_scales(model: nn.Module, num_layers: int, decay: float) -> dict[str, float]:
    """Learning rate of each parameter as a multiple of the top layer's: decay^(L - l) for layer l of L.

    Embeddings are layer 0; what follows the layers goes at the top one's rate.

    Raises:
        ValueError: The model has no list of layers.
    """
    _, count = find_layers(model, num_layers)
    depths = layer_depths(model, num_layers)
    return {name: float(decay ** (count - min(depth, count))) for name, depth in depths.items()}


def trust_ratio(old: Tensor, step: Tensor, wished: float, largest: float) -> Tensor:
    """What a step is multiplied by to be `wished` * min(|old|, largest) long; 1 where either is 0."""
    target = wished * torch.linalg.vector_norm(old).clamp(max=largest)
    length = torch.linalg.vector_norm(step)
    is_usable = (target > 0) & (length > 0)
    return torch.where(is_usable, target / length, torch.ones_like(length))
