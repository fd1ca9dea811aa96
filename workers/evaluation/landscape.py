"""The loss around a model's weights, in filter-normalised directions (Li et al. 2018), and its sharpness."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.data.batches import Rows
from workers.data.masks import Ids, Weights
from workers.evaluation.likelihood import validation_loss

Direction = dict[str, Tensor]
Step = tuple[float, Direction]  # so far along a direction
Evaluate = Callable[[], float]

DEFINITION = (
    "mean of L(theta + r d) - L(theta) over random directions d and both signs, in nats per supervised"
    " token; each filter of d is as long as that filter of the weights, and r is the relative radius"
)


class Subset:
    """The same rows for every model, drawn once without replacement and kept in their order."""

    def __init__(self, rows: Rows, count: int, seed: int) -> None:
        total = len(rows.lengths)
        generator = np.random.default_rng(seed)
        self.indices = np.sort(generator.choice(total, size=min(count, total), replace=False))
        self._rows = rows

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self._rows.lengths[self.indices]

    def row(self, index: int) -> tuple[Ids, Weights]:
        """Token ids of a row and the loss weight of each token as a target."""
        return self._rows.row(int(self.indices[index]))


@dataclass(frozen=True)
class Sharpness:
    """How fast the loss rises; `definition` says of what the number is the mean."""

    value: float  # nats
    stderr: float  # over directions
    relative_radius: float
    num_directions: int
    definition: str = DEFINITION


@dataclass(frozen=True)
class Surface:
    """The loss on a grid: `loss[i][j]` at `first_axis[i]` along the first, `second_axis[j]` along the second."""

    name: str
    center_loss: float
    first_axis: list[float]
    second_axis: list[float]
    loss: list[list[float]]
    sharpness: Sharpness
    first_direction: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Axes:
    """Where a surface is looked at: factors along two directions.

    `toward` is one direction for all models instead of the first random one: from base to tuned.
    """

    first: list[float]
    second: list[float]
    seed: int
    toward: Direction | None = None

    @classmethod
    def grid(cls, points: int, radius: float, seed: int, toward: Direction | None = None) -> "Axes":
        """An odd number of points from -radius to radius each way, so that the centre is one of them.

        Raises:
            ValueError: The number is even or below 3, or the radius is not above 0.
        """
        if points < 3 or points % 2 == 0:
            raise ValueError(f"grid: {points} is not an odd number of at least 3")
        if not radius > 0:
            raise ValueError(f"radius: {radius} is not above 0")
        half = points // 2
        axis = [radius * k / half for k in range(-half, half + 1)]
        return cls(axis, list(axis), seed, toward)

    @property
    def first_name(self) -> str:
        """What the first axis shows."""
        return "random, filter-normalised" if self.toward is None else "from base to tuned"

    def directions(self, model: nn.Module) -> tuple[Direction, Direction]:
        """Both directions at a model's weights."""
        first = random_direction(model, self.seed) if self.toward is None else self.toward
        return first, random_direction(model, self.seed + 1)


def loss_of(model: nn.Module, rows: Rows, *, token_budget: int = 8192) -> float:
    """Mean cross-entropy in nats per supervised token: the validation loss of a run."""
    return validation_loss(model, rows, token_budget=token_budget)[0]


def random_direction(model: nn.Module, seed: int) -> Direction:
    """A Gaussian direction whose filters are as long as the weights' own; vectors don't move.

    A filter is an output row of a linear layer, a row of an embedding table, a kernel of a convolution. Tied
    tensors are one parameter and get one direction. The noise depends on (seed, name) alone, so models of the
    same shapes are looked at in the same directions.
    """
    columns = _column_filters(model)
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        mixed = int.from_bytes(f"{seed}/{name}".encode(), "little") % (2**63 - 25)
        generator = torch.Generator().manual_seed(mixed)
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        weight = parameter.detach().float()
        own = filter_norms(weight, by_column=name in columns)
        drawn = filter_norms(noise, by_column=name in columns)
        direction[name] = noise * torch.where(drawn > 0, own / drawn, torch.zeros_like(own))
    return direction


def filter_norms(weight: Tensor, *, by_column: bool = False) -> Tensor:
    """Norm of each filter, of a shape that broadcasts against the weight.

    Two dimensions: a filter is a row (a column where a layer keeps its weight transposed). Three: experts
    stacked, rows again. Four and five: convolution kernels.
    """
    if by_column:
        dims: tuple[int, ...] = (-2,)
    else:
        dims = (-1,) if weight.ndim < 4 else tuple(range(1, weight.ndim))
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    return norms


def difference(of: nn.Module, to: nn.Module) -> Direction:
    """The way from one model's weights to another's of the same shapes, not normalised.

    Raises:
        ValueError: Their parameters differ in name or shape.
    """
    ours, theirs = dict(of.named_parameters()), dict(to.named_parameters())
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise ValueError("the two models differ in their parameters")
    return {n: (theirs[n].detach() - p.detach()).float() for n, p in ours.items()}


def sharpness(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    relative_radius: float = 0.1,
    num_directions: int = 8,
    seed: int = 0,
) -> Sharpness:
    """The mean rise of the loss a little way off; see `DEFINITION`. The weights come back bit for bit."""
    center = evaluate()
    rises = []
    with displaced(model) as move:
        for k in range(num_directions):
            move(())  # a direction is as long as the weights that it leaves
            direction = random_direction(model, seed + 1000 + k)
            pair = []
            for sign in (1.0, -1.0):
                move([(sign * relative_radius, direction)])
                pair.append(evaluate() - center)
            rises.append(sum(pair) / 2)
    spread = float(np.std(rises, ddof=1)) if num_directions > 1 else float("nan")
    return Sharpness(
        value=float(np.mean(rises)),
        stderr=spread / num_directions**0.5,
        relative_radius=relative_radius,
        num_directions=num_directions,
    )


def surface(
    name: str,
    model: nn.Module,
    evaluate: Evaluate,
    axes: Axes,
    measured: Sharpness,
    *,
    tell: Callable[[int, int], None] = lambda _, __: None,
) -> Surface:
    """The loss on a grid around the model's weights, which come back bit for bit.

    Args:
        name: Of the model.
        model: In evaluation or training mode, as the evaluation wants it.
        evaluate: The loss of the model as it stands. At the centre the weights are those of the model, so
            the value there is that of a plain evaluation.
        axes: Where to look.
        measured: Its sharpness.
        tell: Called with (points done, points in all).
    """
    first, second = axes.directions(model)
    values = np.empty((len(axes.first), len(axes.second)))
    with displaced(model) as move:
        for i, along in enumerate(axes.first):
            for j, across in enumerate(axes.second):
                move([(along, first), (across, second)])
                values[i, j] = evaluate()
                tell(i * len(axes.second) + j + 1, values.size)
    return Surface(
        name=name,
        center_loss=evaluate(),
        first_axis=axes.first,
        second_axis=axes.second,
        loss=values.tolist(),
        sharpness=measured,
        first_direction=axes.first_name,
    )


@contextlib.contextmanager
def displaced(model: nn.Module) -> Iterator[Callable[[Sequence[Step]], None]]:
    """Gives a function that puts the weights at start + sum of factor * direction; restored bit for bit after."""
    params = dict(model.named_parameters())
    kept = {name: p.detach().clone() for name, p in params.items()}

    def move(steps: Sequence[Step]) -> None:
        with torch.no_grad():
            for name, parameter in params.items():
                parameter.copy_(kept[name])
                for factor, direction in steps:
                    if name in direction and factor != 0.0:
                        parameter.add_(direction[name].to(parameter.dtype), alpha=factor)

    try:
        yield move
    finally:
        move(())


def _column_filters(model: nn.Module) -> frozenset[str]:
    """Weights kept as (inputs, outputs), as GPT-2's layers do: their filters are columns."""
    transposed = {
        id(module.weight) for module in model.modules() if type(module).__name__ == "Conv1D"
    }
    return frozenset(name for name, p in model.named_parameters() if id(p) in transposed)
