"""Rows that a model decoded itself: made when they are due, kept in checkpoints, and put back after one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.strategies.context import Context, Decoding

if TYPE_CHECKING:
    from workers.strategies.batch import TokenRow

PREFIX = "generated/"
TENSORS = (
    "ids",
    "lengths",
    "prompts",
)  # flat token ids; tokens and leading prompt tokens of each row


class GeneratedRows:
    """The rows of one strategy; a store of the run's, `<kind>-generated-<task>`, while they are in use."""

    def __init__(self, kind: str, num_rows: int, decoding: Decoding) -> None:
        self.num_rows = num_rows
        self.decoding = decoding
        self.made_at: tuple[int, int] | None = None  # task and accepted steps
        self.times = 0  # decoded so far: part of the seed
        self._kind = kind
        self._rows: list[TokenRow] = []
        self._is_shown = False

    def __len__(self) -> int:
        """How many rows there are now."""
        return len(self._rows)

    @property
    def store(self) -> str:
        """The name of their store."""
        return f"{self._kind}-generated-{self.made_at[0] if self.made_at else 0}"

    @property
    def indices(self) -> tuple[int, ...]:
        """Into the store."""
        return tuple(range(len(self._rows)))

    def make(self, ctx: Context, *, base: bool) -> None:
        """Decodes new rows in place of the old.

        Args:
            ctx: Of the run.
            base: By the starting model in place of the one in training.

        Raises:
            ValueError: The run can't decode.
        """
        if ctx.sample is None:
            raise ValueError(f"{self._kind}: this run can't decode rows")
        generator = ctx.generator(f"{self._kind}/generated/{self.times}")
        available = ctx.num_training_rows
        chosen: list[int] = []
        while len(chosen) < self.num_rows:  # every prompt once before one is taken again
            chosen += torch.randperm(available, generator=generator).tolist()
        self._rows = ctx.sample(
            ctx.domain_store,
            chosen[: self.num_rows],
            self.decoding,
            generator,
            base=base,
        )
        self.made_at = (ctx.task_index, ctx.step)
        self.times += 1
        self._is_shown = False

    def is_due(self, ctx: Context, every: int | None) -> bool:
        """Whether the rows are another task's, or older than so many steps (None: however old)."""
        if self.made_at is None or self.made_at[0] != ctx.task_index:
            return True
        return every is not None and ctx.step - self.made_at[1] >= every

    def show(self, ctx: Context) -> None:
        """Makes the rows a store of the run, where they are not yet.

        Raises:
            ValueError: The run takes no stores.
        """
        if self._is_shown:
            return
        if ctx.add_store is None:
            raise ValueError(f"{self._kind}: this run takes no rows of a strategy's own")
        ctx.add_store(self.store, self._rows)
        self._is_shown = True

    def tensors(self) -> dict[str, Tensor]:
        """The rows, for a checkpoint; nothing where there are none."""
        if not self._rows:
            return {}
        values: Sequence[list[int]] = (
            [token for ids, _ in self._rows for token in ids],
            [len(ids) for ids, _ in self._rows],
            [sum(weight == 0 for weight in weights) for _, weights in self._rows],
        )
        return {
            PREFIX + name: torch.tensor(value, dtype=torch.int32)
            for name, value in zip(TENSORS, values, strict=True)
        }

    def scalars(self) -> dict[str, Any]:
        """When they were made, for a checkpoint."""
        return {"made_at": self.made_at, "times": self.times}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Takes up what `tensors` and `scalars` gave.

        Raises:
            ValueError: They don't fit each other.
        """
        self.times = int(scalars["times"])
        made_at = scalars["made_at"]
        self.made_at = None if made_at is None else (int(made_at[0]), int(made_at[1]))
        self._rows, self._is_shown = [], False
        own = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        if bool(own) != (self.made_at is not None) or (own and own.keys() != set(TENSORS)):
            raise ValueError(f"state of {self._kind}: its decoded rows are not all there")
        if not own:
            return
        ids, at = own["ids"].tolist(), 0
        for length, prompt in zip(own["lengths"].tolist(), own["prompts"].tolist(), strict=True):
            weights = [0.0] * prompt + [1.0] * (length - prompt)
            self._rows.append((ids[at : at + length], weights))
            at += length
        if at != len(ids):
            raise ValueError(f"state of {self._kind}: its decoded rows have the wrong lengths")
