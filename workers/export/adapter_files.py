"""A plain LoRA adapter as peft lays it out: one JSON file and one of tensors; written, and joined with others."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import TrainingFailed
from workers.export.combine import Factors, cat

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def write_adapter(directory: Path, model: nn.Module, name: str, base_model: str | None) -> None:
    """Writes one adapter of a peft model, without the model card, and naming the base model instead of its path.

    Args:
        directory: Made where it is not there.
        model: A peft model.
        name: Of its adapter.
        base_model: What `base_model_name_or_path` says.
    """
    wrapped: Any = model
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".adapter-") as scratch:
        wrapped.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        written = Path(scratch) if name == "default" else Path(scratch) / name
        directory.mkdir(exist_ok=True)
        for file in (CONFIG, TENSORS):
            shutil.move(written / file, directory / file)
    path = directory / CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def join_adapters(directory: Path, below: Sequence[Path]) -> None:
    """Makes an adapter the sum of itself and others, exactly: factors side by side, the rank the sum of the ranks.

    A layer that one of them leaves alone has zeros in its place there, as peft has one rank for all layers.

    Args:
        directory: Of the adapter; it is written anew.
        below: Of the others; only read.

    Raises:
        TrainingFailed: One is no plain LoRA adapter (`not_joinable`).
    """
    found = [_read(path) for path in (*below, directory)]
    config = found[-1][0]
    ranks = [int(each["r"]) for each, _ in found]
    layers = sorted({layer for _, factors in found for layer in factors})
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        known = next(factors[layer] for _, factors in found if layer in factors)
        parts = [
            _padded(factors.get(layer), known, rank)
            for (_, factors), rank in zip(found, ranks, strict=True)
        ]
        joined = cat(parts, [1.0] * len(parts))
        tensors[layer + _A] = joined.A_RI.contiguous()
        tensors[layer + _B] = joined.B_OR.contiguous()
    targets = {name for each, _ in found for name in each["target_modules"]}
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "target_modules": sorted(targets)}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    tensors = load_file(directory / TENSORS)
    layers = {name.removesuffix(_A) for name in tensors if name.endswith(_A)}
    if (
        config.get("use_dora")
        or config.get("use_rslora")
        or config.get("rank_pattern")
        or config.get("alpha_pattern")
        or not isinstance(config["target_modules"], list)
        or tensors.keys() != {layer + end for layer in layers for end in (_A, _B)}
    ):
        raise TrainingFailed(
            "artifact: only plain LoRA adapters can be joined", None, "not_joinable"
        )
    scale = float(config["lora_alpha"]) / int(config["r"])
    return config, {
        layer: Factors(tensors[layer + _A].float(), tensors[layer + _B].float(), scale)
        for layer in layers
    }


def _padded(factors: Factors | None, like: Factors, rank: int) -> Factors:
    """An adapter's factors of a layer, with zeros where it has none."""
    if factors is None:
        return Factors(torch.zeros(rank, like.A_RI.shape[1]), torch.zeros(like.B_OR.shape[0], rank))
    missing = rank - factors.rank
    if not missing:
        return factors
    return Factors(
        F.pad(factors.A_RI, (0, 0, 0, missing)), F.pad(factors.B_OR, (0, missing)), factors.scale
    )
