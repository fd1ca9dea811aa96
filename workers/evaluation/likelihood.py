"""Negative log-likelihood of texts: nats and token counts, and the validation loss of a token store."""

# Shape letters: N scored tokens.

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.data.batches import Rows
from workers.data.masks import Ids
from workers.evaluation.forward import (
    CHUNK_ELEMENTS,
    Reader,
    log_probs,
    pad_rows,
    scoring,
    token_batches,
)
from workers.evaluation.items import TextItem, supervised


class Target(NamedTuple):
    """A row and the columns of its targets."""

    ids: Ids
    columns: NDArray[np.int64]


def score_texts(
    reader: Reader, items: Sequence[TextItem], token_budget: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Nats summed over each text's targets (infinite when not a number), and how many there are.

    A text longer than the model's context is cut at the end.
    """
    targets = [Target(*supervised(item, reader.max_tokens)) for item in items]
    nats = np.zeros(len(items), np.float64)
    order = sorted(range(len(items)), key=lambda k: len(targets[k].ids))
    for batch in token_batches(order, [len(t.ids) for t in targets], token_budget):
        chosen = [targets[k] for k in batch]
        row_of_N, logits, targets_N = _read(reader, chosen)
        if len(row_of_N):
            values = log_probs(logits, targets_N).double().cpu().numpy()
            nats[batch] = -np.bincount(row_of_N, weights=values, minlength=len(batch))
    nats[np.isnan(nats)] = np.inf
    counts = np.asarray([len(t.columns) for t in targets], np.float32)
    return nats.astype(np.float32), counts


def validation_loss(
    model: nn.Module,
    store: Rows,
    *,
    token_budget: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[float, float]:
    """Weighted mean cross-entropy in nats per supervised token, and the share predicted right.

    With several ranks each reads its share of the rows, the sums are added over the process group, and
    all get the same numbers.

    Args:
        model: A causal model; its mode is restored.
        store: The validation rows.
        token_budget: Columns times rows of one forward at most.
        rank: Of this process.
        world_size: Number of processes.
    """
    sums = np.zeros(3, np.float64)  # weighted nats, tokens predicted right, weights
    order = np.argsort(store.lengths, kind="stable")[rank::world_size].tolist()
    with scoring(model):
        reader = Reader(model)
        for batch in token_batches(order, store.lengths, token_budget):
            sums += _sum_rows(reader, store, batch)
    if world_size > 1:
        total = torch.from_numpy(sums).to(reader.device)
        torch.distributed.all_reduce(total)
        sums = total.cpu().numpy()
    if sums[2] == 0:
        return float("nan"), float("nan")
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


def _sum_rows(reader: Reader, store: Rows, batch: Sequence[int]) -> NDArray[np.float64]:
    rows = [store.row(index) for index in batch]
    targets = [Target(ids, np.flatnonzero(weights > 0)) for ids, weights in rows]
    weights_N = np.concatenate([w[t.columns] for (_, w), t in zip(rows, targets, strict=True)])
    _, logits, targets_N = _read(reader, targets)
    values = log_probs(logits, targets_N).double().cpu().numpy()
    right = _is_right(logits, targets_N).cpu().numpy()
    weights = weights_N.astype(np.float64)
    return np.asarray([-(values * weights).sum(), (right * weights).sum(), weights.sum()])


def _is_right(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    step = max(CHUNK_ELEMENTS // logits_NV.shape[-1], 1)
    return torch.cat([chunk.argmax(dim=-1) for chunk in logits_NV.split(step)]) == targets_N


def _read(reader: Reader, rows: Sequence[Target]) -> tuple[NDArray[np.int64], Tensor, Tensor]:
    """The row of each target, the logits of the position before it, and its id."""
    padded_BT = pad_rows([row.ids for row in rows])
    counts = [len(row.columns) for row in rows]
    row_of_N = np.repeat(np.arange(len(rows)), counts)
    columns_N = np.concatenate([row.columns for row in rows])
    targets_N = reader.tensor(padded_BT[row_of_N, columns_N])
    if not len(row_of_N):
        return row_of_N, torch.empty(0, 1, device=reader.device), targets_N
    positions = reader.tensor(row_of_N * padded_BT.shape[1] + columns_N - 1)
    return row_of_N, reader.logits(reader.tensor(padded_BT), positions), targets_N
