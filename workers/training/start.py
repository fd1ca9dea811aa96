"""The starting model of a job that goes on from a version or a checkpoint, written out as one model."""

import shutil
from pathlib import Path

import torch
from torch import nn

from app.domain.runplan import BasePlan, LayerPlan
from workers.evaluation.adapters import load_adapter
from workers.export.adapter_files import write_adapter
from workers.export.merge import active_adapters, merge_adapter
from workers.training.adapters import adapt
from workers.training.checkpoints import set_weights
from workers.training.models import load_base, load_tokenizer
from workers.training.ranks import Ranks

MODEL = "model"


def write_start(base: BasePlan, directory: Path, ranks: Ranks) -> BasePlan:
    """Puts every layer into the weights below it, in float32, so that a run sees one base model as any other.

    It is made anew by every attempt, from the same files to the same bytes.

    Args:
        base: With layers.
        directory: Of the attempt; rank 0 writes there, the others wait.
        ranks: Of this run.

    Returns:
        The plan of what was written; its layers are directories of adapters.

    Raises:
        TrainingFailed: An artifact or a checkpoint does not fit.
    """
    layers = [
        layer.model_copy(update={"directory": str(directory / f"layer-{place}")})
        if layer.kind == "checkpoint" and base.takes_adapters
        else layer
        for place, layer in enumerate(base.layers)
    ]
    if ranks.is_speaker:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _write(base, directory, [Path(layer.directory) for layer in layers])
    ranks.broadcast(None)
    return base.model_copy(update={"directory": str(directory / MODEL), "layers": tuple(layers)})


def _write(base: BasePlan, directory: Path, adapters: list[Path]) -> None:
    model = load_base(base.quantized("none"), torch.device("cpu"), torch.float32)
    for layer, adapter in zip(base.layers, adapters, strict=True):
        wrapped = _over(model, layer)
        active = active_adapters(wrapped)  # one, or none where whole weights were trained
        if active and not adapter.exists():
            write_adapter(adapter, wrapped, active[0], base.name)
        model = merge_adapter(wrapped, active[0]) if active else wrapped
    model.save_pretrained(directory / MODEL)  # type: ignore[operator] # transformers is untyped
    load_tokenizer(base).save_pretrained(directory / MODEL)


def _over(model: nn.Module, layer: LayerPlan) -> nn.Module:
    """The model with a layer over it."""
    if layer.kind == "checkpoint":
        assert layer.training is not None
        wrapped = adapt(model, layer.training, (), ())
        set_weights(wrapped, Path(layer.directory))
        return wrapped
    return load_adapter(model, Path(layer.directory))
