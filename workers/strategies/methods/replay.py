"""Replay: rows of general data in every step's mix."""

import hashlib
import math
from collections.abc import Mapping
from typing import ClassVar

import torch

from workers.strategies.base import (
    Context,
    Cost,
    Micro,
    Needs,
    StateDict,
    Strategy,
    Stream,
)

SOURCE = "replay"


class Replay(Strategy):
    """Keeps a small store of general rows in training; the strength is the mix ratio.

    Replayed tokens enter the task's cross-entropy under its one denominator, so the mix ratio is the
    weight. The strength counts rows added to each step, as a share of `batch_size`.

    Args:
        store_fraction: Share of the general rows that is stored, drawn once.
        min_store_rows: At least as many, as far as there are.
    """

    kind: ClassVar[str] = "replay"

    def __init__(self, *, store_fraction: float = 0.05, min_store_rows: int = 32) -> None:
        self.store_fraction = store_fraction
        self.min_store_rows = min_store_rows
        self.store: tuple[int, ...] = ()  # indices into the general rows, ascending
        self._mix = 0.0
        self._rows = 0
        self._tokens = 0.0
        self._all_tokens = 0.0

    def needs(self) -> Needs:
        """General rows."""
        return Needs(general_rows=True)

    def cost(self) -> Cost:
        """A row added costs what a row costs."""
        return Cost(step_share=self._mix)

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds `replay` while it is turned on.

        Raises:
            ValueError: There are no general rows to replay.
        """
        if not self.store:
            self.store = self._choose_store(ctx)
        self._mix = ctx.strength(self.kind)
        if self._mix <= 0:
            return streams
        if not self.store:
            raise ValueError("replay: there are no general rows to replay")
        stream = Stream(SOURCE, self.store, "general", self._mix, counts_as_task=True)
        return (*streams, stream)

    def on_step_start(self, ctx: Context) -> None:
        """Begins the counts of the step."""
        self._rows, self._tokens, self._all_tokens = 0, 0.0, 0.0

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Adds no term: replayed tokens count as the task's. Keeps the counts that are reported."""
        if self._mix > 0:
            self._rows += sum(source == SOURCE for source in micro.sources)
            self._tokens += float(micro.source_mask_N(frozenset({SOURCE})).sum())
            self._all_tokens += float(micro.is_task_B[micro.row_of_N].sum())
        return {}

    def metrics(self) -> Mapping[str, float]:
        """Of this rank's part of the step: replayed rows and tokens, and their share of the task's tokens.

        The row share is the mix ratio; the token share differs from it where lengths do.
        """
        return {
            "rows": float(self._rows),
            "tokens": self._tokens,
            "token_share": self._tokens / self._all_tokens if self._all_tokens else 0.0,
        }

    def state_dict(self) -> StateDict:
        """What the store holds; cursors belong to the sampler."""
        scalars = {"store_rows": len(self.store), "store_sha256": self._digest()}
        return {**super().state_dict(), "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Checks that the store is the saved one.

        Raises:
            ValueError: It is not, or the state is another strategy's.
        """
        super().load_state_dict(state)
        saved = (state["scalars"]["store_rows"], state["scalars"]["store_sha256"])
        if self.store and saved != (len(self.store), self._digest()):
            raise ValueError("state of replay: its store is not the one that this run draws")

    def _choose_store(self, ctx: Context) -> tuple[int, ...]:
        """One row from each of equal stretches of the file: files are often ordered by source."""
        available = ctx.num_general_rows
        wanted = math.ceil(self.store_fraction * available)
        count = min(max(wanted, self.min_store_rows), available)
        uniform = torch.rand(count, generator=ctx.generator(self.kind), dtype=torch.float64)
        rows = []
        for index, share in enumerate(uniform.tolist()):
            start, end = index * available // count, (index + 1) * available // count
            rows.append(start + int(share * (end - start)))
        return tuple(rows)

    def _digest(self) -> str:
        return hashlib.sha256(",".join(map(str, self.store)).encode()).hexdigest()
