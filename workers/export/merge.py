"""Merging an adapter into the base weights, checked against the change that the adapter makes."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from app.errors import TrainingFailed
from workers.export.bottleneck import BottleneckModel

TOLERANCE_EPS: Final = 8.0  # roundings of the weight's own type, relative to its largest entry


@contextlib.contextmanager
def keeping_flags(model: nn.Module) -> Iterator[None]:
    """What requires a gradient is as before afterwards: peft sets it whenever adapters are switched."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def adapted_layers(model: nn.Module, adapter: str, code: str) -> dict[str, Any]:
    """The layers that a plain LoRA adapter changes, by name.

    Raises:
        TrainingFailed: There are none, or the adapter changes more than `scale * B @ A` (DoRA and other
            variants, trained biases, whole modules); with the given code.
    """
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if adapter in (getattr(layer, "modules_to_save", None) or ()):
            _refuse(f"{name}: the adapter replaces this module", code)
        if adapter not in getattr(layer, "lora_B", ()):
            continue
        if adapter in layer.lora_variant or layer.lora_bias[adapter]:
            _refuse(f"{name}: the adapter is no plain LoRA", code)
        layers[name] = layer
    if not layers:
        _refuse(f"the model has no adapter '{adapter}'", code)
    config: Any = cast("Any", model).peft_config[adapter]
    if config.bias != "none":
        _refuse("the adapter trains biases", code)
    return layers


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters that act; none for a model that has no adapter."""
    if isinstance(model, BottleneckModel):
        return model.active
    wrapped: Any = model
    return tuple(wrapped.active_adapters) if hasattr(model, "peft_config") else ()


def changes_something(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter has left its start, where `lora_B` is 0."""
    factors = [p for n, p in model.named_parameters() if f".lora_B.{adapter}." in n]
    return any(bool(factor.any()) for factor in factors)


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of a wrapped model belongs to a LoRA adapter."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """What the base calls a parameter or tensor that a wrapped model has under this name."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors with every active adapter's change in them, by the base's names; `model` stays as it is.

    Raises:
        TrainingFailed: An adapter is no plain LoRA or is merged already, or a weight is quantised; code
            `merge_failed`.
    """
    changes: dict[str, Tensor] = {}
    for adapter in active_adapters(model):
        for name, layer in adapted_layers(model, adapter, "merge_failed").items():
            if layer.merged or not layer.get_base_layer().weight.is_floating_point():
                _refuse(f"{name}: the weight is quantised, or merged already", "merge_failed")
            key = f"{base_name(name)}.weight"
            change = adapter_change(layer, adapter)
            changes[key] = changes[key] + change if key in changes else change
    wrapped: Any = model
    merged: dict[str, Tensor] = {}
    for name, tensor in wrapped.get_base_model().state_dict().items():
        if is_adapter_weight(name):
            continue
        key = base_name(name)
        change_of_it = changes.pop(key, None)
        merged[key] = (
            tensor if change_of_it is None else (tensor.float() + change_of_it).to(tensor.dtype)
        )
    if changes:
        _refuse(f"{next(iter(changes))} is no weight of the base", "merge_failed")
    return merged


@torch.no_grad()
def merge_onto(model: nn.Module, base: nn.Module) -> None:
    """Adds every active adapter's change to a base in place; what the adapters lie on in `model` isn't read.

    Args:
        model: A peft model, whose own base may be quantised.
        base: The same model unwrapped, with floating-point weights.

    Raises:
        TrainingFailed: An adapter is no plain LoRA, or the base has no such weight; code `merge_failed`.
    """
    weights = dict(base.named_parameters())
    for adapter in active_adapters(model):
        for name, layer in adapted_layers(model, adapter, "merge_failed").items():
            weight = weights.get(f"{base_name(name)}.weight")
            change = adapter_change(layer, adapter)
            if weight is None or weight.shape != change.shape or not weight.is_floating_point():
                _refuse(f"{name} is no weight of the base", "merge_failed")
            else:
                weight.copy_(weight.float() + change.to(weight.device))


def adapter_change(layer: Any, adapter: str) -> Tensor:  # noqa: ANN401 - peft is untyped
    """What an adapter adds to a layer's weight: scale * B @ A in float32, in the weight's own layout."""
    lora_A, lora_B = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    change: Tensor = (lora_B @ lora_A) * layer.scaling[adapter]
    return change.T if layer.fan_in_fan_out else change


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: str = "default") -> nn.Module:
    """The base model with the adapter in its weights; `model` itself is used up.

    peft's merge is not trusted: every merged weight is compared with W + scale * B @ A, computed here.

    Args:
        model: A peft model whose only active adapter is `adapter`.
        adapter: The adapter's name.

    Raises:
        TrainingFailed: The adapter is no plain LoRA, is merged already, or a merged weight isn't what it
            should be; code `merge_failed`.
    """
    layers = adapted_layers(model, adapter, "merge_failed")
    wanted: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.merged or list(layer.active_adapters) != [adapter]:
            _refuse(f"{name}: another adapter is active or merged", "merge_failed")
        weight = layer.get_base_layer().weight
        if weight.is_floating_point():
            wanted[name] = weight.float() + adapter_change(layer, adapter)
        else:
            _refuse(f"{name}: the weight is quantised", "merge_failed")
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    merged: nn.Module = cast("Any", model).merge_and_unload(safe_merge=True)
    for name, layer in bases.items():
        found = layer.weight
        limit = TOLERANCE_EPS * torch.finfo(found.dtype).eps * float(wanted[name].abs().max())
        if not bool(((found.float() - wanted[name]).abs() <= limit).all()):
            _refuse(f"{name}: the merged weight is not base plus change", "merge_failed")
    return merged


def _refuse(problem: str, code: str) -> None:
    raise TrainingFailed(f"adapter: {problem}", None, code)
