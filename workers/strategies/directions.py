"""Directions of displacement that earlier jobs left: read, written, and seen from an adapter's factors."""

# Shape letters: R rank of an adapter or of a direction, I inputs and O outputs of a linear layer.

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.strategies.context import Context, LoraPair

TRAJECTORY_FILE: Final = "trajectory.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_FILE: Final = "adapter_model.safetensors"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PEFT_PREFIX: Final = "base_model.model."
LEFT, RIGHT, DENSE = "left/", "right/", "direction/"


class Direction(NamedTuple):
    """A displacement of one base weight: `dense`, or `left` @ `right` where that is smaller."""

    dense: Tensor | None = None
    left_OR: Tensor | None = None
    right_RI: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base weight."""
        if self.left_OR is not None and self.right_RI is not None:
            return (self.left_OR.shape[0], self.right_RI.shape[1])
        return () if self.dense is None else tuple(self.dense.shape)

    def whole(self) -> Tensor:
        """The displacement itself."""
        if self.left_OR is not None and self.right_RI is not None:
            return self.left_OR @ self.right_RI
        if self.dense is None:
            raise ValueError("a direction without tensors")
        return self.dense

    def pulled_back(
        self, lora_A_RI: Tensor, lora_B_OR: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The direction of (A, B) that moves the effective weight most along this one.

        It is the adjoint of (dA, dB) -> scale (dB A + B dA): (scale B' D, scale D A').
        """
        if self.left_OR is not None and self.right_RI is not None:
            along_A = (lora_B_OR.T @ self.left_OR) @ self.right_RI
            along_B = self.left_OR @ (self.right_RI @ lora_A_RI.T)
            return scale * along_A, scale * along_B
        whole = self.whole()
        return scale * (lora_B_OR.T @ whole), scale * (whole @ lora_A_RI.T)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Direction":
        """The same elsewhere."""
        return Direction(*(None if t is None else t.to(device, dtype) for t in self))


def base_name(name: str) -> str:
    """A parameter's name in the bare base model, whatever adapters are wrapped around it."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def pair_name(pair: LoraPair) -> str:
    """The name in the bare base model of the weight that an adapter changes."""
    layer = pair.name if pair.adapter == "default" else pair.name.removesuffix(f".{pair.adapter}")
    return base_name(f"{layer}.weight")


def displacement(ctx: Context, start: Mapping[str, Tensor]) -> dict[str, Direction]:
    """How far every trained weight has come, by its name in the base model; adapters as factors.

    Args:
        ctx: Of the run.
        start: Trained parameters as they were, by canonical name.
    """
    found: dict[str, Direction] = {}
    names = {id(p): name for name, p in ctx.params.items()}
    factors: set[str] = set()
    for pair in ctx.lora_pairs:
        name_A, name_B = names.get(id(pair.lora_A)), names.get(id(pair.lora_B))
        if name_A is None or name_B is None or name_A not in start or name_B not in start:
            continue
        factors |= {name_A, name_B}
        found[pair_name(pair)] = _effective_change(pair, start[name_A], start[name_B])
    for name, parameter in ctx.params.items():
        if name in start and name not in factors:
            found[base_name(name)] = Direction(parameter.detach() - start[name])
    return found


def write_trajectory(directory: Path, directions: Mapping[str, Direction]) -> None:
    """Writes directions as `trajectory.safetensors`, in float32."""
    tensors: dict[str, Tensor] = {}
    for name, direction in directions.items():
        if direction.left_OR is not None and direction.right_RI is not None:
            tensors |= {LEFT + name: direction.left_OR, RIGHT + name: direction.right_RI}
        else:
            tensors[DENSE + name] = direction.whole()
    plain = {key: t.detach().float().cpu().contiguous() for key, t in tensors.items()}
    save_file(plain, directory / TRAJECTORY_FILE)


def read_trajectory(directory: Path) -> dict[str, Direction]:
    """The directions of a published model: its trajectory, else its adapter's change of the base.

    Raises:
        ValueError: It has neither, or its files can't be read.
    """
    if (directory / TRAJECTORY_FILE).is_file():
        tensors = _read(directory / TRAJECTORY_FILE)
        found = {
            k.removeprefix(DENSE): Direction(t) for k, t in tensors.items() if k.startswith(DENSE)
        }
        for key, left in tensors.items():
            if key.startswith(LEFT):
                name = key.removeprefix(LEFT)
                found[name] = Direction(None, left, tensors[RIGHT + name])
        return found
    if (directory / ADAPTER_CONFIG).is_file():
        return {name: Direction(None, *pair) for name, pair in _read_adapter(directory).items()}
    raise ValueError(
        f"{directory.name} has no {TRAJECTORY_FILE}: publish it with record_trajectory, or name two models"
        " with reference 'difference'"
    )


def read_difference(later: Path, earlier: Path) -> dict[str, Direction]:
    """The displacement from one published model to another: two adapters of one base, or two full models.

    Raises:
        ValueError: They are not of one kind, or their weights differ in name or shape.
    """
    kinds = {(path / ADAPTER_CONFIG).is_file() for path in (later, earlier)}
    if len(kinds) > 1:
        raise ValueError("a difference needs two adapters or two full models, not one of each")
    if kinds == {True}:
        new, old = _read_adapter(later), _read_adapter(earlier)
        _check_same(_pair_shapes(new), _pair_shapes(old))
        return {
            name: Direction(
                None,
                torch.cat([left, -old[name][0]], 1),
                torch.cat([right, old[name][1]], 0),
            )
            for name, (left, right) in new.items()
        }
    now, before = _read_weights(later), _read_weights(earlier)
    _check_same({n: t.shape for n, t in now.items()}, {n: t.shape for n, t in before.items()})
    return {name: Direction(value.float() - before[name].float()) for name, value in now.items()}


def fit(ctx: Context, directions: Mapping[str, Direction]) -> dict[str, Direction]:
    """Those directions that trained weights have, on the run's device and in float32 or wider.

    Raises:
        ValueError: A name is no weight of the model, a shape differs, or no trained weight has one.
    """
    shapes = {
        base_name(name): tuple(value.shape)
        for name, value in ctx.model.state_dict().items()
        if isinstance(value, Tensor)
    }
    shapes |= {pair_name(pair): tuple(pair.base_weight.shape) for pair in ctx.lora_pairs}
    for name, direction in directions.items():
        if name not in shapes:
            raise ValueError(f"the reference's {name} is no weight of this model")
        if direction.shape != shapes[name]:
            raise ValueError(
                f"the reference's {name} has shape {direction.shape}, the model's {shapes[name]}"
            )
    trained = {pair_name(pair): pair.lora_A for pair in ctx.lora_pairs}
    trained |= {base_name(name): p for name, p in ctx.params.items()}
    fitting = {
        name: directions[name].to(ctx.device, torch.promote_types(p.dtype, torch.float32))
        for name, p in trained.items()
        if name in directions
    }
    if not fitting:
        raise ValueError("the reference has no direction for any weight that this job trains")
    return fitting


def _effective_change(pair: LoraPair, start_A: Tensor, start_B: Tensor) -> Direction:
    left = pair.scale * pair.lora_B.detach()
    right = pair.lora_A.detach()
    if bool(start_B.any()):  # a fresh adapter starts at no change at all
        left = torch.cat([left, -pair.scale * start_B], 1)
        right = torch.cat([right, start_A.to(right.dtype)], 0)
    return Direction(None, left, right)


def _read_adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """scale * B and A of every adapted weight, by its name in the base model."""
    config: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text())
    if config.get("use_dora") or config.get("alpha_pattern") or config.get("rank_pattern"):
        raise ValueError(f"{directory.name}: only plain LoRA adapters are read as a direction")
    tensors = _read(directory / ADAPTER_FILE)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, right in tensors.items():
        layer, mark, _ = key.partition(".lora_A.")
        if mark:
            rank = right.shape[0]
            scale = float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
            left = tensors[key.replace(".lora_A.", ".lora_B.")]
            found[base_name(f"{layer}.weight")] = (scale * left.float(), right.float())
    if not found:
        raise ValueError(f"{directory.name}: the adapter has no LoRA factors")
    return found


def _pair_shapes(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, torch.Size]:
    return {
        name: torch.Size((left.shape[0], right.shape[1])) for name, (left, right) in pairs.items()
    }


def _read_weights(directory: Path) -> dict[str, Tensor]:
    index = directory / INDEX_FILE
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return {name: t for file in files for name, t in _read(directory / Path(file).name).items()}
    return _read(directory / WEIGHTS_FILE)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            get: Callable[[str], Tensor] = file.get_tensor
            return {name: get(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} can't be read: {error}") from error


def _check_same(new: Mapping[str, torch.Size], old: Mapping[str, torch.Size]) -> None:
    if new.keys() != old.keys():
        odd = sorted(new.keys() ^ old.keys())[0]
        raise ValueError(f"the two models differ: {odd} is in one of them alone")
    for name, shape in new.items():
        if old[name] != shape:
            raise ValueError(f"the two models differ in the shape of {name}")
