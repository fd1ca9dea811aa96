"""Routing: which domain's adapter answers a prompt, or the base where none is near."""

# Shape letters: B rows, T tokens, D width of a representation, K adapters.

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import TrainingFailed
from workers.evaluation.forward import scoring, token_batches

ROUTING_FILE: Final = "routing.json"
CENTROIDS_FILE: Final = "routing.safetensors"
PLACE_TOKENS: Final = 8192  # padded tokens of one forward

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Router(Generic[Row]):
    """Nearest centroid by cosine; below the threshold the base, which is None.

    Args:
        names: Of the adapters.
        centroids_KD: Of unit norm, in the order of `names`.
        threshold: Of the largest similarity.
        represent: Unit-norm representations (B, D) of rows, made as those that the centroids are means of.
    """

    names: tuple[str, ...]
    centroids_KD: Tensor
    threshold: float
    represent: Callable[[Sequence[Row]], Tensor]

    def route(self, row: Row) -> str | None:
        """The adapter for a row, or None for the base."""
        return self.route_all([row])[0]

    def route_all(self, rows: Sequence[Row]) -> list[str | None]:
        """The adapter for each row."""
        if not rows:
            return []
        represented_BD = self.represent(rows).to(self.centroids_KD)
        best, index = (represented_BD @ self.centroids_KD.T).max(1)
        pairs = zip(best.tolist(), index.tolist(), strict=True)
        return [self.names[k] if value >= self.threshold else None for value, k in pairs]


def load_router(directory: Path, represent: Callable[[Sequence[Row]], Tensor]) -> Router[Row]:
    """The router of an artifact.

    Args:
        directory: Of the artifact.
        represent: As `routing.json` says under `representation`: `base` is `base_representations` of the
            base model; `encoder` is the job's encoder.

    Raises:
        TrainingFailed: The files don't fit one another; code `damaged_artifact`.
    """
    record = json.loads((directory / ROUTING_FILE).read_text())
    centroids = load_file(directory / CENTROIDS_FILE)
    if centroids.keys() != set(record["names"]):
        raise TrainingFailed("artifact: routing names other adapters", None, "damaged_artifact")
    stacked = torch.stack([centroids[name] for name in record["names"]])
    return Router(tuple(record["names"]), stacked, float(record["threshold"]), represent)


def run_by_route(
    rows: Sequence[Row],
    routes: Sequence[str | None],
    activate: Callable[[Sequence[str]], None],
    run: Callable[[Sequence[Row]], Sequence[Result]],
) -> list[Result]:
    """What `run` says of each row with its own adapter active, a group of rows at a time.

    Args:
        rows: Any.
        routes: The adapter of each row; None is the base.
        activate: Lets adapters alone act; none of them leaves the base.
        run: Results of some rows, one a row, by the model as it stands.

    Returns:
        Results in the order of the rows. The last group's adapter stays active.
    """
    groups: dict[str | None, list[int]] = {}
    for place, name in enumerate(routes):
        groups.setdefault(name, []).append(place)
    results: dict[int, Result] = {}
    for name, places in sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or "")):
        activate([] if name is None else [name])
        results |= dict(zip(places, run([rows[place] for place in places]), strict=True))
    return [results[place] for place in range(len(rows))]


def base_representations(
    model: nn.Module, rows: Sequence[Sequence[int] | NDArray[np.int32]]
) -> Tensor:
    """Unit-norm means (B, D) of the base model's last hidden states over the tokens of each row.

    Args:
        model: A base model, or one with adapters, which are switched off meanwhile.
        rows: Token ids of prompts, each at least one.
    """
    wrapped: Any = model
    if not hasattr(model, "disable_adapter"):
        return _represent(wrapped, rows)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with wrapped.disable_adapter():
        found = _represent(wrapped.get_base_model(), rows)
    for parameter, flag in flags:  # peft makes active adapters trainable on the way out
        parameter.requires_grad_(flag)
    return found


def pool(hidden_BTD: Tensor, weights_BT: Tensor) -> Tensor:
    """Means over tokens by weight, of unit norm, in float32: (B, D)."""
    summed_BD = torch.einsum("btd,bt->bd", hidden_BTD.float(), weights_BT.float())
    return F.normalize(summed_BD, dim=-1)


def prompt_mask(loss_weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 on the tokens before the first that is learnt, which is what is known of a row when it is routed.

    Rows that are learnt from their first or second token on have no prompt: all of their tokens count.
    """
    learnt = np.flatnonzero(loss_weights)
    first = int(learnt[0]) if learnt.size else 0
    mask = np.ones(len(loss_weights), np.float32)
    if first > 1:
        mask[first:] = 0.0
    return mask


def _represent(model: Any, rows: Sequence[Any]) -> Tensor:  # noqa: ANN401 - transformers is untyped
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    found: dict[int, Tensor] = {}
    with scoring(model):
        for batch in token_batches(order, lengths, PLACE_TOKENS):
            width = max(lengths[index] for index in batch)
            ids = np.zeros((len(batch), width), np.int64)
            mask = np.zeros((len(batch), width), np.float32)
            for k, index in enumerate(batch):
                ids[k, : lengths[index]] = rows[index]
                mask[k, : lengths[index]] = 1.0
            out = model.get_decoder()(input_ids=torch.from_numpy(ids).to(device), use_cache=False)
            pooled = pool(out.last_hidden_state, torch.from_numpy(mask).to(device))
            found |= dict(zip(batch, pooled, strict=True))
    return torch.stack([found[index] for index in range(len(rows))])
