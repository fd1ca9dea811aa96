"""Distributions of a teacher cached by row: made in one pass, kept across jobs, and looked up by micro-batch."""

# Shape letters: N positions, K kept tokens, V vocabulary, C cached positions, S cached rows.

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.strategies.batch import Micro
from workers.strategies.context import Context
from workers.strategies.topk import TopK, keep_top

SMALL_VOCABULARY = 2**16  # ids of such a vocabulary take two bytes
CHUNK_ROWS = 64  # hashed together
CHUNK_POSITIONS = 2**13  # summed over ranks together
BY_POSITION = ("columns_C", "ids_CK", "log_p_CK", "log_tail_C")
STORED = frozenset({"rows_S", "counts_S", *BY_POSITION})
Predict = Callable[[Micro], Tensor]


class Distributions:
    """Cached distributions of some rows of one store, in host memory: 6 K + 6 bytes a position at most.

    Args:
        tensors: `rows_S`, `counts_S` (positions of each row), `columns_C`, `ids_CK` (two bytes each up to a
            vocabulary of 65,536), `log_p_CK` and `log_tail_C` in half precision.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: value.cpu() for name, value in tensors.items()}
        self._covered: Sequence[int] | None = None
        counts = self.tensors["counts_S"].tolist()
        starts = [0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]
        rows = self.tensors["rows_S"].tolist()
        self._spans = {
            row: (starts[i], count) for i, (row, count) in enumerate(zip(rows, counts, strict=True))
        }

    def covers(self, rows: Sequence[int]) -> bool:
        """Whether every one of these rows is cached; at once for the tuple that was asked last."""
        if rows is not self._covered:
            if not all(row in self._spans for row in rows):
                return False
            self._covered = rows
        return True

    def span(self, row: int) -> tuple[int, int]:
        """Where a row's positions begin, and how many they are.

        Raises:
            ValueError: The row is not cached.
        """
        if row not in self._spans:
            raise ValueError(f"row {row} has no cached distributions")
        return self._spans[row]


def look_up(caches: Mapping[str, Distributions], micro: Micro) -> TopK:
    """The cached distributions at the positions of the rows whose source is named, in order.

    Log-probabilities come back as float32 and are normalised anew, so that what half precision took does
    not pull a student that is its teacher.

    Args:
        caches: By source of the rows.
        micro: With at least one such row.

    Raises:
        ValueError: A row is not cached, or its supervised positions are not those that were.
    """
    found = []
    for source, row in zip(micro.sources, micro.sample_ids, strict=True):
        if source in caches:
            start, count = caches[source].span(row)
            tensors = caches[source].tensors
            found.append([tensors[n][start : start + count] for n in BY_POSITION])
    columns, ids, log_p, log_tail = (torch.cat(list(part)) for part in zip(*found, strict=True))
    device = micro.positions_N.device
    own_N = micro.source_mask_N(frozenset(caches))
    seen = micro.positions_N[own_N] % micro.input_ids_BT.shape[1]
    if not torch.equal(columns.to(device, torch.int64), seen):
        raise ValueError("a row is not the one whose distributions were cached")
    is_narrow = ids.dtype == torch.int16  # stored without a sign bit
    ids = ids.to(torch.int64)
    if is_narrow:
        ids &= 0xFFFF
    log_p, log_tail = log_p.to(device).float(), log_tail.to(device).float()
    total = torch.logaddexp(log_tail, torch.logsumexp(log_p, -1))
    return TopK(ids.to(device), log_p - total[:, None], log_tail - total)


def make_distributions(
    ctx: Context, store: str, rows: Sequence[int], predict: Predict, *, k: int, temperature: float
) -> dict[str, Tensor]:
    """One pass over rows of a store, shared out over the ranks; every rank gets the whole.

    Args:
        ctx: Of the run.
        store: Where the rows lie.
        rows: Indices, ascending.
        predict: Logits (N, V) of the teacher at a micro-batch's positions, in evaluation mode.
        k: Tokens kept of each position.
        temperature: Of the loss that the distributions are for.

    Returns:
        What `Distributions` takes.
    """
    place = {row: index for index, row in enumerate(rows)}
    parts: list[_Part] = []
    for micro in ctx.store_micros(store, rows):
        logits_NV = predict(micro)
        kept = keep_top(logits_NV, k, temperature)
        columns_N = micro.positions_N % micro.input_ids_BT.shape[1]
        is_small = logits_NV.shape[-1] <= SMALL_VOCABULARY
        types = (torch.int32, torch.int16 if is_small else torch.int32, *[torch.float16] * 2)
        found = (columns_N, kept.ids_NK, kept.log_p_NK, kept.log_tail_N)
        counts = torch.bincount(micro.row_of_N, minlength=len(micro.sources)).tolist()
        parts.append(
            _Part(
                places=[place[row] for row in micro.sample_ids],
                counts=counts,
                values=[x.to(t).cpu() for x, t in zip(found, types, strict=True)],
            )
        )
    return {"rows_S": torch.tensor(rows), **_join(ctx, len(rows), parts)}


class _Part(NamedTuple):
    places: list[int]  # of the micro-batch's rows among all
    counts: list[int]  # positions of each
    values: list[Tensor]  # by position, in the order of `BY_POSITION`


def _join(ctx: Context, num_rows: int, parts: Sequence[_Part]) -> dict[str, Tensor]:
    """The parts in the order of the rows, summed over ranks: each position is one rank's alone."""
    counts = torch.zeros(num_rows, dtype=torch.int64)
    for part in parts:
        counts[part.places] = torch.tensor(part.counts)
    ctx.all_reduce(counts)
    facts = torch.zeros(3, dtype=torch.int64)  # a rank without rows does not know them
    if parts:
        ids = parts[0].values[1]
        facts = torch.tensor([1, ids.shape[-1], int(ids.dtype == torch.int32)])
    ctx.all_reduce(facts)
    knowing, kept, wide = facts.tolist()
    kept //= max(knowing, 1)
    starts = [0, *counts.cumsum(0).tolist()]
    size = starts[-1]
    joined = (
        torch.zeros(size, dtype=torch.int32),
        torch.zeros((size, kept), dtype=torch.int32 if wide else torch.int16),
        torch.zeros((size, kept), dtype=torch.float16),
        torch.zeros(size, dtype=torch.float16),
    )
    for part in parts:
        at = 0
        for place, count in zip(part.places, part.counts, strict=True):
            for whole, values in zip(joined, part.values, strict=True):
                whole[starts[place] : starts[place] + count] = values[at : at + count]
            at += count
    if ctx.world_size > 1:
        for whole in joined:
            for chunk in whole.split(CHUNK_POSITIONS):
                total = chunk.to(torch.float64)  # holds ids and half-precision numbers exactly
                ctx.all_reduce(total)
                chunk.copy_(total)
    return {"counts_S": counts, **dict(zip(BY_POSITION, joined, strict=True))}


def rows_digest(ctx: Context, store: str, rows: Sequence[int]) -> str:
    """Hash of what the rows hold: token ids and supervised positions; the same on every rank.

    Raises:
        ValueError: The run gives no access to rows.
    """
    if ctx.rows_micro is None:
        raise ValueError("this run has no rows to look up")
    digest = hashlib.sha256()
    for start in range(0, len(rows), CHUNK_ROWS):
        micro = ctx.rows_micro(store, store, rows[start : start + CHUNK_ROWS])
        for tensor in (micro.input_ids_BT, micro.positions_N, micro.targets_N):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def base_distributions(
    ctx: Context, store: str, rows: Sequence[int], *, k: int, temperature: float
) -> Distributions:
    """The starting model's distributions on rows, from the cache that jobs share where they are in it.

    Keyed by teacher, content of the rows, k and temperature, never by row numbers.

    Raises:
        ValueError: The run gives no access to rows or to the starting model.
    """
    base_forward = ctx.base_forward
    if base_forward is None:
        raise ValueError("this run has no starting model at hand")

    def predict(micro: Micro) -> Tensor:
        return base_forward(micro, torch.ones_like(micro.row_of_N, dtype=torch.bool))

    def make() -> dict[str, Tensor]:
        return make_distributions(ctx, store, rows, predict, k=k, temperature=temperature)

    numbers = hashlib.sha256(repr(tuple(rows)).encode()).hexdigest()
    content = rows_digest(ctx, store, rows)
    tensors = ctx.cached(f"base/topk/{k}/{temperature}/{numbers}/{content}", make)
    return Distributions(tensors)


class CachedTeacher:
    """The starting model's distributions on the rows of chosen streams.

    Args:
        sources: Names of the streams.
        k: Tokens kept of each position.
        temperature: Of the loss that the distributions are for.
    """

    def __init__(self, sources: Iterable[str], *, k: int, temperature: float) -> None:
        self.sources = frozenset(sources)
        self.k = k
        self.temperature = temperature
        self._caches: dict[str, tuple[str, Distributions]] = {}  # store and content, by source

    def fill(self, ctx: Context) -> None:
        """Caches what the streams in force hold and the cache does not; every rank calls it alike.

        A copy of the starting model that was loaded for it is let go of.

        Raises:
            ValueError: The run gives no access to rows or to the starting model.
        """
        missing = []
        for stream in ctx.streams:
            if stream.name in self.sources:
                store, known = self._caches.get(stream.name, ("", None))
                if store != stream.store or known is None or not known.covers(stream.rows):
                    missing.append(stream)
        for stream in missing:
            made = base_distributions(
                ctx, stream.store, sorted(stream.rows), k=self.k, temperature=self.temperature
            )
            self._caches[stream.name] = (stream.store, made)
        if missing:
            ctx.release_base()

    @property
    def known(self) -> dict[str, Distributions]:
        """What is cached, by source."""
        return {source: cache for source, (_, cache) in self._caches.items()}

    def look_up(self, micro: Micro) -> TopK:
        """The distributions at the positions of its sources' rows, in order.

        Raises:
            ValueError: A row is not cached, or not the one that was.
        """
        return look_up(self.known, micro)
