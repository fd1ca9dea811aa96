"""Pacing: which domain rows are drawn yet, and how many general rows are mixed in."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.batch import Micro, Stream
from workers.strategies.context import Context
from workers.strategies.modes import evaluating

Difficulty = Literal["none", "nll", "length"]
DOMAIN: Final = "domain"
GENERAL: Final = "general"
REPLAY: Final = "replay"
HASHED_ROWS: Final = 256  # at a time


def competence(step: float, total: float, start: float, power: float) -> float:
    """c(t) = min(1, (t (1 - c0^p) / T + c0^p)^(1/p)): the share of rows, easiest first, that is drawn at step t.

    Platanios et al., 2019; p = 1 is linear, p = 2 the square root.
    """
    if total <= 0:
        return 1.0
    ready = step * (1.0 - start**power) / total + start**power
    return float(min(1.0, ready ** (1.0 / power)))


def mix_share(step: float, total: float, start: float, end: float) -> float:
    """m(t) = m1 + (m0 - m1) (1 + cos(pi t / T)) / 2: general rows' share of a step's rows; m1 from step T on."""
    if total <= 0 or step >= total:
        return end
    return end + (start - end) * (1.0 + math.cos(math.pi * step / total)) / 2.0


def num_drawn(share: float, num_rows: int, at_least: int) -> int:
    """How many of the easiest rows have a difficulty rank k / n of at most `share`; never fewer than a step's."""
    return min(num_rows, max(math.floor(share * num_rows + 1e-9), at_least, 1))


class Curriculum:
    """Restricts the domain stream to its easiest rows at first, and mixes general rows in.

    Args:
        difficulty: What rows are ranked by: `nll`, the starting model's nats per supervised token; `length`,
            the tokens up to the last supervised one; `none` draws all rows.
        start: Share of the rows drawn at first, c0.
        power: p of the competence.
        steps: Share of a task's steps after which all rows are drawn and the mix is at its end.
        mix_start: General rows' share of all rows at first; None mixes none in.
        mix_end: Their share at the end.
    """

    def __init__(
        self,
        *,
        difficulty: Difficulty,
        start: float,
        power: float,
        steps: float,
        mix_start: float | None,
        mix_end: float,
    ) -> None:
        self.difficulty: Difficulty = difficulty
        self.start = start
        self.power = power
        self.steps = steps
        self.mix_start = mix_start
        self.mix_end = mix_end
        self.values: dict[str, Tensor] = {}  # difficulty of each row, by store
        self.drawn = 1.0  # share of the domain's rows in this step
        self.mixed = 0.0  # general rows asked for, as a share of batch_size
        self._plan: tuple[int, float] | None = None  # what the streams were last made for
        self._ranked: tuple[tuple[str, int], tuple[int, ...]] | None = None

    def measure(self, ctx: Context) -> None:
        """Ranks the rows of every task by the model as it is, once, before the first step."""
        if self.difficulty == "none" or self.values:
            return
        for store, size in ctx.store_sizes.items():
            if store.startswith("training"):
                self.values[store] = self._measure_store(ctx, store, size)

    def plan(self, ctx: Context, num_rows: int, scale: float) -> tuple[int, float]:
        """Domain rows to draw from in this step, and general rows to ask for as a share of `batch_size`."""
        # before a task's first step, `step` is still that of the task before
        step, total = max(ctx.step - ctx.task_first_step, 0), self.steps * ctx.task_steps
        count = num_rows
        if self.difficulty != "none":
            share = competence(step, total, self.start, self.power)
            count = num_drawn(share, num_rows, ctx.batch_size)
        mixed = 0.0
        if self.mix_start is not None:
            share = scale * mix_share(step, total, self.mix_start, self.mix_end)
            # Of d domain and g general rows, g / (d + g) is the share; replayed rows are general ones.
            mixed = max(share / (1.0 - share) - ctx.coefs.get(REPLAY, 0.0), 0.0)
        return count, mixed

    def is_due(self, ctx: Context, num_rows: int, scale: float) -> bool:
        """Whether this step's streams differ from those made last; `scale` 0 is off."""
        return self._plan != (self.plan(ctx, num_rows, scale) if scale > 0 else None)

    def edit(self, ctx: Context, streams: tuple[Stream, ...], scale: float) -> tuple[Stream, ...]:
        """The streams of this step.

        Raises:
            ValueError: General rows are to be mixed in and there are none.
        """
        domain = next(s for s in streams if s.name == DOMAIN)
        self.drawn, self.mixed, self._plan = 1.0, 0.0, None
        if scale <= 0:
            return streams
        count, self.mixed = self.plan(ctx, len(domain.rows), scale)
        is_ranked = self.difficulty == "none" or domain.store in self.values
        self._plan = (count, self.mixed) if is_ranked else None  # else: made again once it is
        if count < len(domain.rows) and is_ranked:
            easiest = replace(domain, rows=self._rank(domain)[:count], is_uniform=True)
            streams = tuple(easiest if s is domain else s for s in streams)
            self.drawn = count / len(domain.rows)
        return self._mix(ctx, streams) if self.mixed > 0 else streams

    def _mix(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        if not ctx.num_general_rows:
            raise ValueError("progressive: there are no general rows to mix in")
        for stream in streams:
            if stream.name == GENERAL:  # one stream serves both, by the larger share
                share = max(stream.rows_per_step, self.mixed)
                shared = replace(stream, rows_per_step=share, counts_as_task=True)
                return tuple(shared if s is stream else s for s in streams)
        rows = tuple(range(ctx.num_general_rows))
        return (*streams, Stream(GENERAL, rows, GENERAL, self.mixed, counts_as_task=True))

    def _rank(self, domain: Stream) -> tuple[int, ...]:
        """The stream's rows, easiest first; of equally hard ones the earlier first."""
        key = (domain.key, len(domain.rows))
        if self._ranked is None or self._ranked[0] != key:
            rows = torch.tensor(domain.rows)
            order = self.values[domain.store].cpu()[rows].argsort(stable=True)
            self._ranked = key, tuple(rows[order].tolist())
        return self._ranked[1]

    def _measure_store(self, ctx: Context, store: str, size: int) -> Tensor:
        if self.difficulty == "length":
            return _per_row(ctx, store, size, _lengths)
        made = ctx.cached(
            f"progressive/nll/1/{_digest(ctx, store, size)}",
            lambda: {"nats": _per_row(ctx, store, size, lambda m: _nats(ctx, m))},
        )
        return made["nats"]


def _per_row(ctx: Context, store: str, size: int, measure: Callable[[Micro], Tensor]) -> Tensor:
    """A number for each row of a store, float32, on every rank."""
    values = torch.zeros(size, dtype=torch.float32, device=ctx.device)
    with evaluating(ctx.model), torch.no_grad():
        for micro in ctx.store_micros(store, range(size)):
            values[torch.tensor(micro.sample_ids, device=ctx.device)] = measure(micro).float()
    ctx.all_reduce(values)  # each row was read by one rank
    return values


def _nats(ctx: Context, micro: Micro) -> Tensor:
    """Mean nats of each row's supervised tokens; 0 for a row without."""
    nats, counts = (torch.zeros(len(micro.sources), device=ctx.device) for _ in range(2))
    if ctx.forward is None:
        raise ValueError("progressive: the context gives no forward")
    if micro.positions_N.numel():
        logits_NV = ctx.forward(micro).logits_NV
        wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        losses_N = F.cross_entropy(wide, micro.targets_N, reduction="none").float()
        nats.index_add_(0, micro.row_of_N, losses_N)
        counts.index_add_(0, micro.row_of_N, torch.ones_like(losses_N))
    return nats / counts.clamp(min=1)


def _lengths(micro: Micro) -> Tensor:
    """Tokens of each row up to its last supervised one."""
    lengths = torch.zeros(len(micro.sources), dtype=torch.int64, device=micro.positions_N.device)
    columns = micro.positions_N % micro.input_ids_BT.shape[1]
    return lengths.scatter_reduce_(0, micro.row_of_N, columns + 2, "amax")


def _digest(ctx: Context, store: str, size: int) -> str:
    """Of the tokens of a store and of what is supervised: the cache is kept across jobs."""
    if ctx.rows_micro is None:
        raise ValueError("progressive: the context gives no rows")
    digest = hashlib.sha256()
    for rows in _chunks(range(size)):
        micro = ctx.rows_micro(DOMAIN, store, rows)
        for tensor in (micro.input_ids_BT, micro.positions_N, micro.targets_N):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _chunks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), HASHED_ROWS):
        yield rows[start : start + HASHED_ROWS]


def check_difficulties(values: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Refuses saved difficulties of other rows.

    Raises:
        ValueError: A store is unknown or has another number of rows.
    """
    for store, saved in values.items():
        if sizes.get(store) != saved.numel():
            raise ValueError(
                f"state of progressive: difficulties of {saved.numel()} rows do not fit {store}"
            )
