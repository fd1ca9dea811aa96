"""Bottleneck adapters: small networks behind the blocks of each decoder layer, one set a domain."""

# Shape letters: B rows, T tokens, D width of the model.

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import TrainingFailed

CONFIG_FILE: Final = "bottleneck_config.json"
WEIGHTS_FILE: Final = "bottleneck.safetensors"
BLOCKS: Final = ("self_attn", "attention", "attn", "mlp", "feed_forward")


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))), without biases (Houlsby 2019): the identity while `up` is 0.

    Args:
        dim: Width of the model.
        width: Of the bottleneck.
        generator: Of `down`'s entries, N(0, 1 / dim).
    """

    def __init__(self, dim: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(width, dim, generator=generator) * dim**-0.5)
        self.up = nn.Parameter(torch.zeros(dim, width))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """What is added, in the type of the adapter."""
        inner = F.linear(hidden_BTD.to(self.down.dtype), self.down)
        return F.linear(F.gelu(inner), self.up)


class BottleneckModel(nn.Module):
    """A causal model with adapters behind the attention and MLP blocks of its decoder layers.

    The active adapters' outputs are added to the block's; with none, the model is the base bit for bit. What
    isn't defined here is the base model's.

    Args:
        base: A transformers model; frozen here.
        names: Of the adapters; none is active yet.
        width: Of each bottleneck.
        seed: Of the random entries.

    Raises:
        TrainingFailed: The model's layers hold no block that is known; code `adapters_unsupported`.
    """

    def __init__(self, base: nn.Module, names: Sequence[str], width: int, *, seed: int) -> None:
        super().__init__()
        self.base_model = base.requires_grad_(requires_grad=False)
        self.width = width
        self.active: tuple[str, ...] = ()
        blocks = find_blocks(base)
        first = next(base.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        dim = int(self.config.get_text_config().hidden_size)
        self.bottlenecks = nn.ModuleDict(
            {
                f"adapter_{name}": nn.ModuleDict(
                    {
                        _key(place): Bottleneck(dim, width, generator).to(first.device, dtype)
                        for place in blocks
                    }
                )
                for name in names
            }
        )
        self.names = tuple(names)
        for place, block in blocks.items():
            block.register_forward_hook(self._hook(_key(place)))

    def forward(self, *inputs: Any, **more: Any) -> Any:  # noqa: ANN401 - transformers is untyped
        """The base model's, with the active adapters."""
        return self.base_model(*inputs, **more)

    def get_base_model(self) -> nn.Module:
        """The wrapped model; active adapters act in it."""
        return self.base_model

    def adapter(self, name: str) -> Mapping[str, Bottleneck]:
        """An adapter's bottlenecks by block."""
        found: Any = self.bottlenecks[f"adapter_{name}"]
        return dict(found.items())

    def activate(self, names: Sequence[str]) -> None:
        """Lets these alone act, in sum."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"there is no adapter '{unknown[0]}'")
        self.active = tuple(names)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model inside."""
        active, self.active = self.active, ()
        try:
            yield
        finally:
            self.active = active

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the base model's attributes
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def _hook(self, key: str) -> Any:  # noqa: ANN401 - a forward hook
        def add(_block: nn.Module, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
            if not self.active:
                return output
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            changed = hidden_BTD
            for name in self.active:  # every one reads the block's own output, so that they add up
                adapters: Any = self.bottlenecks[f"adapter_{name}"]
                changed = changed + adapters[key](hidden_BTD).to(hidden_BTD.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return add


def _key(place: str) -> str:
    """A block's name as a module may be called."""
    return place.replace(".", "_")


def find_blocks(base: nn.Module) -> dict[str, nn.Module]:
    """The attention and MLP blocks of a model's decoder layers, by `<layer>.<block>`.

    Raises:
        TrainingFailed: There are none; code `adapters_unsupported`.
    """
    model: Any = base
    layers = getattr(model.get_decoder(), "layers", None) or getattr(model.get_decoder(), "h", None)
    blocks = {
        f"{index}.{name}": block
        for index, layer in enumerate(layers or ())
        for name, block in layer.named_children()
        if name in BLOCKS
    }
    if not blocks:
        raise TrainingFailed(
            "bottleneck adapters: the model's layers have no attention or MLP block by a known name",
            "retention.strategies",
            "adapters_unsupported",
        )
    return blocks


def save_bottlenecks(directory: Path, model: BottleneckModel, *, base_model: str | None) -> None:
    """Writes every adapter into a directory of its own, and what is active into the root's configuration."""
    record = {
        "format": 1,
        "base_model_name_or_path": base_model,
        "names": list(model.names),
        "active": list(model.active),
        "width": model.width,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    for name in model.names:
        own = directory / name
        own.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{block}.{factor}": getattr(bottleneck, factor).detach().cpu().contiguous()
            for block, bottleneck in model.adapter(name).items()
            for factor in ("down", "up")
        }
        save_file(tensors, own / WEIGHTS_FILE)


def load_bottlenecks(base: nn.Module, directory: Path) -> BottleneckModel:
    """A base model with the adapters of an artifact, those active that were.

    Raises:
        TrainingFailed: The files don't fit the model; code `damaged_artifact`.
    """
    record = json.loads((directory / CONFIG_FILE).read_text())
    model = BottleneckModel(base, record["names"], record["width"], seed=0)
    for name in model.names:
        tensors = load_file(directory / name / WEIGHTS_FILE)
        own = {
            f"{block}.{factor}": getattr(bottleneck, factor)
            for block, bottleneck in model.adapter(name).items()
            for factor in ("down", "up")
        }
        if tensors.keys() != own.keys() or any(tensors[k].shape != own[k].shape for k in own):
            raise TrainingFailed(
                f"artifact: the adapter '{name}' does not fit the model", None, "damaged_artifact"
            )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(tensors[key])
    model.activate(record["active"])
    return model
