"""What a step reads: streams of rows, micro-batches, what their forwards give, and the terms of the loss."""

# Shape letters: B rows, T tokens, N selected positions of a micro-batch, V vocabulary.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

TokenRow = tuple[list[int], list[float]]  # token ids, and the loss weight of each as a target


@dataclass(frozen=True)
class Stream:
    """A source of rows in every step.

    Args:
        name: `domain`, `general`, `replay`, ...; becomes the rows' `source`.
        rows: Indices into the named store (`training` or `general`) that the stream draws from.
        store: Which tokenised store the indices point into.
        rows_per_step: Rows added to each step, as a share of `batch_size`; error diffusion makes the
            cumulative count exact. The domain stream has 1.0.
        counts_as_task: Whether its supervised tokens enter the task cross-entropy.
        is_uniform: Each step draws afresh, uniformly and no row twice, and epochs stand still meanwhile:
            for rows that are a part of the stream's for a while.
    """

    name: str
    rows: tuple[int, ...]
    store: str
    rows_per_step: float
    counts_as_task: bool
    is_uniform: bool = False

    @property
    def key(self) -> str:
        """What its cursor is kept under: the rows of a later stage are another stream of the same name."""
        return self.name if self.store in ("training", "general") else f"{self.name}@{self.store}"


@dataclass(frozen=True)
class Micro:
    """One right-padded micro-batch; no attention mask is needed for causal models.

    `positions_N` are flat indices (row * T + column) of the positions whose *next* token is supervised,
    in row-major order; everything with an N is aligned with them. `row_of_N` gives each position's row.
    """

    input_ids_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor
    row_of_N: Tensor
    weights_N: Tensor  # float32 loss weight of the position (1 unless the row says otherwise)
    sources: tuple[str, ...]  # one a row
    sample_ids: tuple[int, ...]  # index of the row in its store
    is_task_B: Tensor  # bool: the row's tokens count as task cross-entropy

    def source_mask_N(self, names: frozenset[str]) -> Tensor:
        """Bool mask of the positions whose row comes from one of the named streams."""
        rows_B = torch.tensor([s in names for s in self.sources], device=self.row_of_N.device)
        return rows_B[self.row_of_N]

    def join(self, other: "Micro") -> "Micro":
        """Both, the other's rows behind these; the narrower one is padded with token 0."""
        own_rows, width = self.input_ids_BT.shape
        other_rows, other_width = other.input_ids_BT.shape
        new_width = max(width, other_width)
        ids_BT = self.input_ids_BT.new_zeros((own_rows + other_rows, new_width))
        ids_BT[:own_rows, :width] = self.input_ids_BT
        ids_BT[own_rows:, :other_width] = other.input_ids_BT
        parts = [(self, 0, width), (other, own_rows, other_width)]

        def rows(micro: "Micro", shift: int) -> Tensor:
            return micro.row_of_N + shift

        return Micro(
            input_ids_BT=ids_BT,
            positions_N=torch.cat(
                [rows(m, k) * new_width + m.positions_N % w for m, k, w in parts]
            ),
            targets_N=torch.cat([self.targets_N, other.targets_N]),
            row_of_N=torch.cat([rows(m, k) for m, k, _ in parts]),
            weights_N=torch.cat([self.weights_N, other.weights_N]),
            sources=self.sources + other.sources,
            sample_ids=self.sample_ids + other.sample_ids,
            is_task_B=torch.cat([self.is_task_B, other.is_task_B]),
        )

    def split(self, num_rows: int) -> "Iterator[Micro]":
        """Parts of so many rows, without the columns behind their last supervised position."""
        width = self.input_ids_BT.shape[1]
        for start in range(0, len(self.sources), num_rows):
            rows = slice(start, start + num_rows)
            own = (self.row_of_N >= start) & (self.row_of_N < start + num_rows)
            row_of_N = self.row_of_N[own] - start
            columns_N = self.positions_N[own] % width
            new_width = int(columns_N.max()) + 1 if columns_N.numel() else 1
            yield replace(
                self,
                input_ids_BT=self.input_ids_BT[rows, :new_width],
                positions_N=row_of_N * new_width + columns_N,
                targets_N=self.targets_N[own],
                row_of_N=row_of_N,
                weights_N=self.weights_N[own],
                sources=self.sources[rows],
                sample_ids=self.sample_ids[rows],
                is_task_B=self.is_task_B[rows],
            )


class Backward(Protocol):
    """Adds gradients to `grad`; see `Strategy.compute_grads`."""

    def __call__(self, micros: Sequence[Micro], /, *, task_only: bool = False) -> None:
        """Of the loss over these micro-batches; `task_only` leaves the strategies' terms out."""
        ...


@dataclass(frozen=True)
class Forward:
    """What one forward gave: logits at the selected positions alone.

    `teacher_logits_NV` has rows only where the teacher was asked for (`teacher_mask_N`), in order; the
    teacher's hidden states are those at the same positions. Hidden states are keyed by layer: 0 is the
    embeddings' output, the last is what the head reads.
    """

    logits_NV: Tensor
    teacher_logits_NV: Tensor | None = None
    teacher_mask_N: Tensor | None = None
    hidden_BTD: Mapping[int, Tensor] = field(default_factory=dict)
    teacher_hidden_SD: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One addend of the loss: sum over the micro-batch, before division by its step-wide count."""

    name: str
    numerator: Tensor
    denominator_key: str
    coef: float
