"""Adapters of a run: surgery on the base model, which of them act, and merging them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from app.domain.configs.adapters import (
    REFUSED_FROM_PARAMETERS,
    RESERVED_NAMES,
    DomainAdaptersConfig,
    share_problem,
)
from app.domain.spec import LoraConfig, ResolvedTraining
from app.domain.strategies import StrategyConfig
from app.errors import TrainingFailed
from workers.export.bottleneck import BottleneckModel, find_blocks
from workers.export.combine import Factors, Merged, Method, combine, relative_error
from workers.export.merge import adapted_layers, keeping_flags
from workers.strategies.context import Adapters
from workers.training.models import ADAPTER, add_adapters
from workers.training.quantization import count_weights

MERGED: Final = "merged"
BOTTLENECK: Final = "bottlenecks."  # where the parameters of bottlenecks begin


def adapt(
    model: nn.Module,
    training: ResolvedTraining,
    strategies: Sequence[StrategyConfig],
    stage_names: Sequence[str],
) -> nn.Module:
    """The base model with the adapters that a job trains, all of them changing nothing yet.

    What requires a gradient afterwards is what some stage trains.

    Args:
        model: The base.
        training: Of the job.
        strategies: Of the job; `domain_adapters` makes one adapter a stage.
        stage_names: Of the job; empty without stages.

    Raises:
        TrainingFailed: An adapter's share of a large model is out of bounds, or it can't be placed or named.
    """
    config = find_config(strategies)
    if config is not None and training.type != "lora":
        raise TrainingFailed(
            "domain_adapters keeps the base frozen, so it needs training.type 'lora'",
            "retention.strategies",
        )
    if config is not None:
        return _adapt_by_domain(model, training, config, adapter_names(stage_names))
    if training.type == "lora" or training.late_adapter:
        model = add_adapters(model, training.lora, seed=training.seed)
    if training.late_adapter:  # which stage trains what is settled as each is entered
        model.requires_grad_(requires_grad=True)
    return model


def find_config(strategies: Sequence[StrategyConfig]) -> DomainAdaptersConfig | None:
    """The configuration of `domain_adapters`, where the job has it."""
    return next((c for c in strategies if isinstance(c, DomainAdaptersConfig)), None)


def adapter_names(stage_names: Sequence[str]) -> tuple[str, ...]:
    """One a stage, called as it is; without stages one, called `default`."""
    return tuple(stage_names) or (ADAPTER,)


def derive_rank(budget: float, num_parameters: int, parameters_a_rank: int) -> int:
    """The largest rank within the budget, at least 1: floor(budget * N / sum(d_in + d_out)) (card 3)."""
    return max(1, int(budget * num_parameters / parameters_a_rank))


def count_widths(model: nn.Module, targets: Sequence[str] | str) -> int:
    """Sum of d_in + d_out over the layers that an adapter is put on: its parameters for each rank."""
    inner: Any = model
    head = inner.get_output_embeddings()
    total = 0
    for name, module in model.named_modules():
        layer: Any = module
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if isinstance(targets, str):
            is_chosen = is_linear and module is not head
        else:
            is_chosen = is_linear and any(name == t or name.endswith(f".{t}") for t in targets)
        if is_chosen:
            total += sum(getattr(layer, "shape", layer.weight.shape))  # codes have another shape
    return total


def show_adapters(model: nn.Module, names: Sequence[str], lora: LoraConfig) -> Adapters:
    """What strategies see of a model's adapters.

    Args:
        model: As `adapt` left it.
        names: Of its adapters, by task.
        lora: Of the job: where adapters are put.
    """
    is_bottleneck = isinstance(model, BottleneckModel)
    params: dict[str, frozenset[str]] = {}
    readers: dict[str, dict[str, nn.Parameter]] = {}
    adapters_size = sum(p.numel() for n, p in model.named_parameters() if _is_adapter(n))
    base_size = count_weights(model) - adapters_size
    own_size = 0
    for name in names:
        own = {
            n: p
            for n, p in model.named_parameters()
            if _is_adapter(n) and (f"adapter_{name}" if is_bottleneck else name) in n.split(".")
        }
        params[name] = frozenset(own)
        readers[name] = {
            _layer(n): p for n, p in own.items() if n.endswith(".down") or "lora_A" in n
        }
        own_size = sum(p.numel() for p in own.values())
    return Adapters(
        names=tuple(names),
        params=params,
        readers=readers,
        share=own_size / base_size,
        activate=lambda active: activate(model, active),
        merge=_merger(model, lora),
    )


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Lets these adapters alone act, in sum; none of them leaves the base. Gradients' flags stay as they are."""
    if isinstance(model, BottleneckModel):
        model.activate(names)
        return
    wrapped: Any = model
    with keeping_flags(model):
        if not names:
            wrapped.base_model.disable_adapter_layers()
            return
        wrapped.base_model.enable_adapter_layers()
        wrapped.set_adapter(names[-1])
        wrapped.base_model.set_adapter(list(names))


def _adapt_by_domain(
    model: nn.Module,
    training: ResolvedTraining,
    config: DomainAdaptersConfig,
    names: Sequence[str],
) -> nn.Module:
    _check_names(model, names)
    lora = training.lora
    size = count_weights(model)
    if config.kind == "bottleneck":
        inner: Any = model
        a_rank = 2 * int(inner.config.get_text_config().hidden_size) * len(find_blocks(model))
        width = config.r or derive_rank(config.budget, size, a_rank)
        _check_share(config, width * a_rank, size)
        return BottleneckModel(model, names, width, seed=training.seed)
    a_rank = count_widths(model, lora.target_modules)
    if not a_rank:
        raise TrainingFailed(
            "training.lora.target_modules: no linear layer goes by one of these names",
            "training.lora.target_modules",
        )
    rank = config.r or derive_rank(config.budget, size, a_rank)
    _check_share(config, rank * a_rank, size)
    # the ratio alpha / r is the size of the change, and stays what the job asked for
    own = lora.model_copy(update={"r": rank, "alpha": lora.alpha / lora.r * rank})
    for index, name in enumerate(names):
        model = add_adapters(model, own, seed=training.seed + 7_919 * index, name=name)
    activate(model, names[:1])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(parameter_name))
    return model


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    """peft finds an adapter's tensors by its name between dots, so no module may be called alike."""
    taken = {part for name, _ in model.named_modules() for part in name.split(".")}
    taken |= {part for name, _ in model.named_parameters() for part in name.split(".")}
    for name in names:
        clashes = name in taken or name in RESERVED_NAMES or hasattr(nn.ModuleDict(), name)
        if clashes or name in "lora_":
            raise TrainingFailed(
                f"stages: '{name}' can't name an adapter of this model; give the stage another name",
                "stages",
            )


def _check_share(config: DomainAdaptersConfig, adapter_size: int, size: int) -> None:
    problem = share_problem(adapter_size / size)
    if problem and size >= REFUSED_FROM_PARAMETERS and not config.allow_any_share:
        raise TrainingFailed(
            f"domain_adapters: {problem}; set allow_any_share to train it all the same",
            "retention.strategies",
            "adapter_share",
        )


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or name.startswith(BOTTLENECK)


def _layer(name: str) -> str:
    """The layer of an adapter's parameter, the same for every adapter."""
    if name.startswith(BOTTLENECK):
        return name.split(".")[2]
    return name.partition(".lora_")[0]


def _merger(model: nn.Module, lora: LoraConfig) -> Callable[..., Mapping[str, float]]:
    def merge(
        names: Sequence[str],
        method: Method,
        *,
        weights: Sequence[float],
        density: float,
        rank: int | None,
        seed: int,
    ) -> dict[str, float]:
        return merge_adapters(
            model,
            lora,
            dict(zip(names, weights, strict=True)),
            method,
            density=density,
            rank=rank,
            seed=seed,
        )

    return merge


@torch.no_grad()
def merge_adapters(
    model: nn.Module,
    lora: LoraConfig,
    weights: Mapping[str, float],
    method: Method,
    *,
    density: float,
    rank: int | None,
    seed: int,
) -> dict[str, float]:
    """Adds an adapter `merged`, made of others by `workers.export.combine`, and lets it alone act.

    Args:
        model: A peft model.
        lora: Where adapters are put.
        weights: Of each adapter that is merged, by name.
        method: Of merging.
        density: Share of entries that `ties` and `dare` keep.
        rank: Of the result; None is the method's own.
        seed: Of `dare`.

    Returns:
        `adapters`, `rank`, `relative_error` (what cutting the rank took away of the merged change) and
        `change_norm`.

    Raises:
        TrainingFailed: An adapter is no plain LoRA; code `merge_failed`.
    """
    wrapped: Any = model
    by_layer: dict[str, list[Factors]] = {}
    for name in weights:
        for layer_name, layer in adapted_layers(model, name, "merge_failed").items():
            by_layer.setdefault(layer_name, []).append(_factors(layer, name))
    generator = torch.Generator().manual_seed(seed)
    merged: dict[str, Merged] = {
        layer_name: combine(
            factors,
            method,
            weights=tuple(weights.values()),
            density=density,
            rank=rank,
            generator=generator,
        )
        for layer_name, factors in by_layer.items()
    }
    new_rank = next(iter(merged.values())).factors.rank
    if MERGED in wrapped.peft_config:
        wrapped.delete_adapter(MERGED)
    own = lora.model_copy(update={"r": new_rank, "alpha": float(new_rank), "dropout": 0.0})
    add_adapters(model, own, seed=0, name=MERGED)
    for layer_name, layer in adapted_layers(model, MERGED, "merge_failed").items():
        factors = merged[layer_name].factors
        layer.lora_A[MERGED].weight.copy_(factors.A_RI)
        layer.lora_B[MERGED].weight.copy_(factors.B_OR)
    activate(model, [MERGED])
    parts = list(merged.values())
    return {
        "adapters": float(len(weights)),
        "rank": float(new_rank),
        "relative_error": relative_error(parts),
        "change_norm": sum(part.squared_norm for part in parts) ** 0.5,
    }


def _factors(layer: Any, adapter: str) -> Factors:  # noqa: ANN401 - peft is untyped
    lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return Factors(lora_A.float(), lora_B.float(), float(layer.scaling[adapter]))
