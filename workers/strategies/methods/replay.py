"""Replay: a small store of general rows in the training mix."""

import math
from collections.abc import Mapping

import torch

from workers.strategies.base import Context, Cost, Needs, StateDict, Strategy, Stream

STREAM = "replay"


class Replay(Strategy):
    """Adds `strength * batch_size` general rows to every step; they share the task's token denominator.

    Args:
        store_fraction: Share of the general rows that is kept.
        min_store_rows: Kept at least, where there are as many.
    """

    kind = "replay"

    def __init__(self, *, store_fraction: float = 0.05, min_store_rows: int = 32) -> None:
        self._fraction = store_fraction
        self._min_rows = min_store_rows
        self._rows: tuple[int, ...] = ()
        self._share = 0.0

    def needs(self) -> Needs:
        """General rows."""
        return Needs(general_rows=True)

    def cost(self) -> Cost:
        """Proportional to the rows added; `strength` of a step."""
        return Cost()

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds the stream of the store, drawn once by the strategy's own generator.

        Raises:
            ValueError: There are no general rows.
        """
        self._share = ctx.strength(self.kind)
        if self._share == 0:
            return streams
        if not self._rows:
            self._rows = self._draw(ctx)
        return (*streams, Stream(STREAM, self._rows, "general", self._share, counts_as_task=True))

    def metrics(self) -> Mapping[str, float]:
        """Rows added as a share of the batch size, and the size of the store."""
        return {"applied_norm": self._share, "store_rows": float(len(self._rows))}

    def state_dict(self) -> StateDict:
        """Which rows are in the store."""
        return super().state_dict() | {
            "tensors": {"rows": torch.tensor(self._rows, dtype=torch.int64)}
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up the store."""
        super().load_state_dict(state)
        self._rows = tuple(state["tensors"]["rows"].tolist())

    def _draw(self, ctx: Context) -> tuple[int, ...]:
        total = ctx.num_general_rows
        if total == 0:
            raise ValueError("replay needs general rows, and none are left after the checks")
        size = min(total, max(self._min_rows, math.ceil(self._fraction * total)))
        order = torch.randperm(total, generator=ctx.generator(self.kind))
        return tuple(sorted(order[:size].tolist()))
