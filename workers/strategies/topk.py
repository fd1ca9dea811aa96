"""Cached distributions: the k likeliest tokens of each position with the mass of all others, and the loss against them."""

# Shape letters: N positions, K kept tokens, V vocabulary, C cached positions, S cached rows.

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from workers.strategies.base import Context, Micro

CHUNK_LOGITS = 2**19  # values in work at once: stays in a core's cache
SMALL_VOCABULARY = 2**16  # ids of such a vocabulary take two bytes
CHUNK_ROWS = 64  # hashed together
Predict = Callable[[Micro], Tensor]


@dataclass(frozen=True)
class TopK:
    """Distributions of N positions; the kept tokens and the bucket of all others add up to 1."""

    ids_NK: Tensor  # int64
    log_p_NK: Tensor  # float32 or wider, over the whole vocabulary
    log_tail_N: Tensor  # log of the mass of all other tokens; -inf where there are none


def keep_top(logits_NV: Tensor, k: int, temperature: float) -> TopK:
    """The k likeliest tokens of each position, with log-probabilities over the whole vocabulary.

    The tail's mass is the logsumexp of its own logits: 1 minus the sum of the kept gives 0 where the truth
    is 3e-9.

    Args:
        logits_NV: Of the teacher.
        k: At most V are kept.
        temperature: Above 0; divides the logits.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in logits_NV.split(_chunk_rows(logits_NV)):
        scaled = chunk.to(wide) / temperature
        kept, ids = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
        log_tail, total = _tail_and_total(scaled, ids, kept)
        parts.append((ids, kept - total[:, None], log_tail - total))
    ids, log_p, log_tail = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return TopK(ids, log_p, log_tail)


def bucketed_kl_sum(
    student_NV: Tensor, kept: TopK, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sum over positions of T^2 * KL(teacher || student) with all tokens outside the top k as one.

    sum over the kept of p log(p / q) + alpha log(alpha / alpha_q), where alpha and alpha_q are the tails'
    masses. It is 0 where the student is the teacher, and below the whole KL by alpha * KL of the tails; its
    gradient is the whole KL's on the kept ids, and q_j (1 - alpha / alpha_q) on the others.

    Args:
        student_NV: Logits of the model in training.
        kept: Of the teacher, at the same temperature.
        temperature: Above 0.

    Returns:
        The sum in nats, and the squared norm of its gradient with respect to the student's logits.

    Raises:
        ValueError: There is not one distribution for each position.
    """
    if len(student_NV) != len(kept.ids_NK):
        raise ValueError(f"{len(kept.ids_NK)} distributions for {len(student_NV)} positions")
    value, squared = _BucketedKl.apply(  # type: ignore[no-untyped-call]
        student_NV, kept.ids_NK, kept.log_p_NK, kept.log_tail_N, temperature
    )
    return value, squared


class _BucketedKl(torch.autograd.Function):
    """`bucketed_kl_sum` with its closed-form gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_NV: Tensor,
        ids_NK: Tensor,
        log_p_NK: Tensor,
        log_tail_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(student_NV.dtype, torch.float32)
        gradient_NV = torch.empty_like(student_NV)
        value = student_NV.new_zeros((), dtype=wide)
        squared = torch.zeros_like(value)
        rows = _chunk_rows(student_NV)
        parts = (x.split(rows) for x in (student_NV, gradient_NV, ids_NK, log_p_NK, log_tail_N))
        for student, gradient, ids, log_p, log_tail in zip(*parts, strict=True):
            losses, slope = _bucketed(student.to(wide) / temperature, ids, log_p, log_tail)
            value += losses.sum() * temperature**2
            slope *= temperature
            squared += (slope * slope).sum()
            gradient.copy_(slope)
        context: Any = ctx
        context.save_for_backward(gradient_NV)
        context.mark_non_differentiable(squared)
        return value, squared

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_value: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        context: Any = ctx
        (gradient_NV,) = context.saved_tensors
        return gradient_NV * grad_value.to(gradient_NV.dtype), None, None, None, None


def _bucketed(
    scaled: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor
) -> tuple[Tensor, Tensor]:
    """Bucketed KL of each position and its gradient with respect to `scaled`, whose values are lost."""
    kept = scaled.gather(-1, ids)
    log_tail_q, total = _tail_and_total(scaled, ids, kept)
    log_q = kept - total[:, None]
    log_ratio = log_tail - (log_tail_q - total)
    alpha = log_tail.exp()
    has_tail = alpha > 0
    # x log x is 0 at 0, where the difference of the logarithms is no number
    of_tail = torch.where(has_tail, alpha * log_ratio, torch.zeros_like(alpha))
    p = log_p.exp()
    losses = (p * (log_p - log_q)).sum(-1) + of_tail
    shrink = torch.where(has_tail, 1.0 - log_ratio.exp(), torch.ones_like(alpha))
    slope = scaled.sub_(total[:, None]).exp_().mul_(shrink[:, None])
    slope.scatter_(-1, ids, log_q.exp() - p)
    return losses, slope


def _tail_and_total(scaled: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp over all but the kept ids, which are set to -inf in place, and over everything."""
    scaled.scatter_(-1, ids, float("-inf"))
    log_tail = torch.logsumexp(scaled, -1)
    return log_tail, torch.logaddexp(log_tail, torch.logsumexp(kept, -1))


def _chunk_rows(values_NV: Tensor) -> int:
    return max(CHUNK_LOGITS // max(values_NV.shape[-1], 1), 1)


class Distributions:
    """Cached distributions of some rows of one store, in host memory: 6 K + 6 bytes a position at most.

    Args:
        tensors: `rows_S`, `counts_S` (positions of each row), `columns_C`, `ids_CK` (two bytes each up to a
            vocabulary of 65,536), `log_p_CK` and `log_tail_C` in half precision.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: value.cpu() for name, value in tensors.items()}
        counts = self.tensors["counts_S"].tolist()
        starts = [0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]
        rows = self.tensors["rows_S"].tolist()
        self._spans = {
            row: (starts[i], count) for i, (row, count) in enumerate(zip(rows, counts, strict=True))
        }

    def covers(self, rows: Sequence[int]) -> bool:
        """Whether every one of these rows is cached."""
        return all(row in self._spans for row in rows)

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
            found.append([tensors[n][start : start + count] for n in _BY_POSITION])
    columns, ids, log_p, log_tail = (torch.cat(list(part)) for part in zip(*found, strict=True))
    device = micro.positions_N.device
    own_N = micro.source_mask_N(frozenset(caches))
    seen = micro.positions_N[own_N] % micro.input_ids_BT.shape[1]
    if not torch.equal(columns.to(device, torch.int64), seen):
        raise ValueError("a row is not the one whose distributions were cached")
    ids = ids.to(torch.int64)
    if tensors["ids_CK"].dtype == torch.int16:
        ids &= 0xFFFF
    log_p, log_tail = log_p.to(device).float(), log_tail.to(device).float()
    total = torch.logaddexp(log_tail, torch.logsumexp(log_p, -1))
    return TopK(ids.to(device), log_p - total[:, None], log_tail - total)


_BY_POSITION = ("columns_C", "ids_CK", "log_p_CK", "log_tail_C")


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
    values: list[Tensor]  # by position, in the order of `_BY_POSITION`


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
            for chunk in whole.split(max(CHUNK_LOGITS // max(kept, 1), 1)):
                total = chunk.to(torch.float64)  # holds ids and half-precision numbers exactly
                ctx.all_reduce(total)
                chunk.copy_(total)
    return {"counts_S": counts, **dict(zip(_BY_POSITION, joined, strict=True))}


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
