"""Memory: representations of what was learnt before, and the rows behind them in every step's mix."""

# Shape letters: R rows, N supervised positions of a micro-batch, V vocabulary.

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.base import Cost, Needs, StateDict, Strategy
from workers.strategies.batch import Micro, Stream
from workers.strategies.context import Context
from workers.strategies.memory_files import save_memory
from workers.strategies.reservoir import Entry, MemoryStore, Policy

SOURCE = "memory"  # general rows
EARLIER = "memory_earlier"  # rows of finished domains: the starting model is no teacher on them
SOURCES = frozenset({SOURCE, EARLIER})
GENERAL = "general"
DUPLICATE = 0.95  # of a dual encoder (card 4)
#: Of mean states: of 2000 distinct rows of the demo 0.95 took 94 % of those offered for repetitions, 0.999 11 %.
BASE_DUPLICATE = 0.999


class Memory(Strategy):
    """Remembers rows by their representations and keeps some of them in training.

    It is filled from the general rows when the first task starts, where there are any, and from each
    domain when its task ends. The strength counts the rows added to each step, as a share of `batch_size`;
    they are drawn uniformly from the memory and enter the task's cross-entropy under its one denominator.

    Args:
        capacity: Entries at most.
        dim: Width of a representation.
        policy: What goes when it is full; see `MemoryStore`.
        dup_threshold: Cosine from which a row counts as a repetition of another; None: 0.95 of a dual
            encoder, 0.999 of the starting model's own states, which lie closer together.
        nll_quantile: Rows whose nats per token under the starting model are below this quantile of the
            rows read are left out: there is nothing in them to remember.
        fill_rows: Rows read at each filling, at most.
        encoder: Whose representations, where not the starting model's own; the loop knows it.
        general: Whether general rows are remembered, too.
        publish: What the published index says of an entry: where its row lies, its text, or no index at all.
    """

    kind: ClassVar[str] = "memory"

    def __init__(  # noqa: PLR0913 - the knobs of its configuration
        self,
        *,
        capacity: int = 10_000,
        dim: int = 512,
        policy: Policy = "quota_reservoir",
        dup_threshold: float | None = None,
        nll_quantile: float = 0.1,
        fill_rows: int = 2048,
        encoder: str | None = None,
        general: bool = True,
        publish: Literal["ids", "texts", "none"] = "ids",
    ) -> None:
        self.capacity = capacity
        self.dim = dim
        self.policy = policy
        self.dup_threshold = dup_threshold or (BASE_DUPLICATE if encoder is None else DUPLICATE)
        self.nll_quantile = nll_quantile
        self.fill_rows = fill_rows
        self.encoder = encoder
        self.general = general
        self.publish = publish
        self._store: MemoryStore | None = None
        self._fillings = 0
        self._too_easy = 0  # rows left out for their nats
        self._overlapping = 0  # for a benchmark's sake
        self._asked = -1  # fillings when the streams in force were made
        self._mix = 0.0
        self._rows = 0
        self._tokens = 0.0
        self._all_tokens = 0.0

    @property
    def store(self) -> MemoryStore:
        """What is remembered.

        Raises:
            RuntimeError: The run has not been seen yet.
        """
        if self._store is None:
            raise RuntimeError("memory: no run has asked for its streams yet")
        return self._store

    def needs(self) -> Needs:
        """The starting model, whose nats decide what is worth remembering."""
        return Needs(base_unmodified=True)

    def cost(self) -> Cost:
        """A row added costs what a row costs; at each filling two or three forwards a row read."""
        return Cost(step_share=self._mix)

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds a stream for each store that the memory holds rows of, by their numbers."""
        self._open(ctx)
        self._mix = ctx.strength(self.kind)
        self._asked = self._fillings
        rows: dict[str, list[int]] = {}
        for entry in self.store.entries:
            rows.setdefault(entry.store, []).append(entry.row)
        if self._mix <= 0 or not rows:
            return streams
        total = len(self.store)
        added = [
            Stream(
                SOURCE if name == GENERAL else EARLIER,
                tuple(sorted(own)),
                name,
                self._mix * len(own) / total,
                counts_as_task=True,
                is_uniform=True,  # its rows change with every filling
            )
            for name, own in sorted(rows.items())
        ]
        return (*streams, *added)

    def on_task_start(self, ctx: Context) -> None:
        """Remembers general rows before the first task."""
        self._open(ctx)
        if ctx.task_index > 0:
            return
        if self.general and ctx.num_general_rows > 0:
            self._fill(ctx, GENERAL, GENERAL)
        if not self.store.entries:
            ctx.note(
                "memory_empty",
                "The memory holds nothing yet, as there are no general rows for it: it acts from the second"
                " stage on.",
                {"stages": ctx.num_tasks},
            )

    def on_task_end(self, ctx: Context) -> None:
        """Remembers rows of the finished domain."""
        self._open(ctx)
        self._fill(ctx, ctx.domain_store, ctx.task_name or ctx.domain_store)

    def on_step_start(self, ctx: Context) -> None:
        """Begins the counts of the step."""
        self._rows, self._tokens, self._all_tokens = 0, 0.0, 0.0

    def streams_changed(self, ctx: Context) -> bool:
        """Where the memory was filled since the streams in force were made."""
        return self._asked != self._fillings

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Adds no term: remembered tokens count as the task's. Keeps the counts that are reported."""
        if self._mix > 0:
            self._rows += sum(source in SOURCES for source in micro.sources)
            self._tokens += float(micro.source_mask_N(SOURCES).sum())
            self._all_tokens += float(micro.is_task_B[micro.row_of_N].sum())
        return {}

    def metrics(self) -> Mapping[str, float]:
        """Of this rank's part of the step: remembered rows and tokens; of the memory: what is and came in."""
        counts = asdict(self._store.counts) if self._store is not None else {}
        return {
            "rows": float(self._rows),
            "tokens": self._tokens,
            "token_share": self._tokens / self._all_tokens if self._all_tokens else 0.0,
            "entries": float(len(self._store.entries)) if self._store is not None else 0.0,
            "too_easy": float(self._too_easy),
            "overlapping": float(self._overlapping),
            **{name: float(count) for name, count in counts.items()},
        }

    def export_files(self, ctx: Context, directory: Path) -> None:
        """Publishes keys and manifest: the index that retrieval at inference reads."""
        if self.publish == "none" or not self.store.entries:
            return
        texts: dict[int, str] = {}
        if self.publish == "texts":
            texts = self._texts(ctx)

        def describe(entry: Entry) -> Mapping[str, Any]:
            return {**asdict(entry), "text": texts.get(entry.id)}

        save_memory(self.store, directory, describe=describe)

    def state_dict(self) -> StateDict:
        """Keys, entries and the choices' generator."""
        tensors, scalars = self.store.state()
        own = {
            "fillings": self._fillings,
            "too_easy": self._too_easy,
            "overlapping": self._overlapping,
        }
        return {**super().state_dict(), "tensors": tensors, "scalars": {**scalars, **own}}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved memory.

        Raises:
            ValueError: Another encoder made its keys, or the state is another strategy's.
        """
        super().load_state_dict(state)
        self.store.load_state(state["tensors"], state["scalars"])
        self._fillings = state["scalars"]["fillings"]
        self._too_easy = state["scalars"]["too_easy"]
        self._overlapping = state["scalars"]["overlapping"]
        self._asked = -1

    def _open(self, ctx: Context) -> None:
        if self._store is None:
            self._store = MemoryStore(
                capacity=self.capacity,
                dim=self.dim,
                encoder=ctx.encoder(),
                seed=ctx.generator(self.kind).initial_seed(),
                policy=self.policy,
                dup_threshold=self.dup_threshold,
            )

    def _fill(self, ctx: Context, store: str, domain: str) -> None:
        """Reads some of a store's rows and offers those worth remembering.

        Raises:
            ValueError: The loop provides no representations or no starting model.
        """
        if ctx.embed is None or ctx.texts is None:
            raise ValueError("memory: this run gives no representations of its rows")
        rows = self._choose_rows(ctx, store)
        hits = ctx.overlaps(store, rows)
        self._overlapping += sum(hits)
        rows = [row for row, hit in zip(rows, hits, strict=True) if not hit]
        nats_R = self._nats_per_token(ctx, store, rows)
        keep = worth_remembering(nats_R, self.nll_quantile).tolist()
        self._too_easy += keep.count(False)
        rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
        if rows:
            candidates = [
                Entry(0, content_hash(text), domain, store=store, row=row)
                for row, text in zip(rows, ctx.texts(store, rows), strict=True)
            ]
            self.store.offer(ctx.embed(store, rows), candidates)
        ctx.release_base()
        self._fillings += 1

    def _choose_rows(self, ctx: Context, store: str) -> list[int]:
        """A uniform sample, ascending; all where there are few."""
        available = ctx.store_sizes[store]
        if available <= self.fill_rows:
            return list(range(available))
        generator = ctx.generator(f"{self.kind}/{store}")
        return sorted(torch.randperm(available, generator=generator)[: self.fill_rows].tolist())

    def _nats_per_token(self, ctx: Context, store: str, rows: Sequence[int]) -> Tensor:
        """Of each row's supervised tokens under the starting model, float64; the same on every rank."""
        if self.nll_quantile <= 0 or not rows:
            return torch.zeros(len(rows), dtype=torch.float64)
        if ctx.base_forward is None:
            raise ValueError("memory: this run keeps no starting model to ask")
        place = {row: index for index, row in enumerate(rows)}
        sums_2R = torch.zeros(2, len(rows), dtype=torch.float64, device=ctx.device)
        for micro in ctx.store_micros(store, rows):
            everything_N = torch.ones_like(micro.targets_N, dtype=torch.bool)
            if not micro.targets_N.numel():
                continue
            logits_NV = ctx.base_forward(micro, everything_N).float()
            nats_N = F.cross_entropy(logits_NV, micro.targets_N, reduction="none").double()
            at = torch.tensor([place[row] for row in micro.sample_ids], device=ctx.device)
            at_N = at[micro.row_of_N]
            sums_2R[0].index_add_(0, at_N, nats_N)
            sums_2R[1].index_add_(0, at_N, torch.ones_like(nats_N))
        ctx.all_reduce(sums_2R)
        return (sums_2R[0] / sums_2R[1]).cpu()

    def _texts(self, ctx: Context) -> dict[int, str]:
        """Of every entry, by id."""
        if ctx.texts is None:
            raise ValueError("memory: this run gives no texts of its rows")
        texts: dict[int, str] = {}
        for name in sorted({entry.store for entry in self.store.entries}):
            own = [entry for entry in self.store.entries if entry.store == name]
            found = ctx.texts(name, [entry.row for entry in own])
            texts |= {entry.id: text for entry, text in zip(own, found, strict=True)}
        return texts


def worth_remembering(nats_R: Tensor, quantile: float) -> Tensor:
    """Bool mask of the rows not below the quantile of their nats per token; rows without a number never are."""
    known_R = torch.isfinite(nats_R)
    if quantile <= 0 or not bool(known_R.any()):
        return known_R
    ordered = nats_R[known_R].sort().values
    floor = ordered[min(math.floor(quantile * len(ordered)), len(ordered) - 1)]
    return known_R & (nats_R >= floor)


def content_hash(text: str) -> str:
    """What an entry is deleted by: sha256 of its text, in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
