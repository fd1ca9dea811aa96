"""The work of a run: how rows fall into micro-batches, the operations of a step, and the seconds they take."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from app.domain.estimates_devices import Rates
from app.domain.estimates_memory import MicroSize, Trained
from app.domain.estimates_shapes import ModelShape
from app.domain.frozen import Frozen

#: Of a passed decoder layer: tensors as wide as what it keeps, read and written forward and backward.
TRAFFIC: Final = 3.0
#: Of an adapted linear layer: float32 values moved forward for each of its inputs and outputs.
ADAPTER_TRAFFIC: Final = 4
#: Bytes of a trained parameter moved by clipping and the optimiser: gradient three times, weight and moments twice.
UPDATE_BYTES: Final = 36
#: Floating point operations that a device does in the time that one more pass is worth.
SPARE_OPERATIONS: Final = {"cuda": 1e12, "cpu": 5e8}


class RowTokens(NamedTuple):
    """A row: tokens, and those of them that are learned."""

    read: int
    learned: int


class StepRows(Frozen):
    """What an average step reads forward and backward."""

    rows: float
    tokens: float  # padded
    real_tokens: float
    supervised: float
    pairs: float  # padded tokens times the width of their micro-batch
    micros: float
    largest: tuple[int, int, int]  # rows, width, supervised of the largest micro-batch

    @property
    def largest_micro(self) -> MicroSize:
        """The largest micro-batch."""
        return MicroSize(*self.largest)

    def times(self, factor: float) -> "StepRows":
        """The same with so many times the rows, in micro-batches that are filled alike."""
        return self.model_copy(
            update={
                name: getattr(self, name) * factor
                for name in ("rows", "tokens", "real_tokens", "supervised", "pairs", "micros")
            }
        )


class Work(Frozen):
    """Operations, bytes moved, and calls of decoder layers."""

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=self.flops + other.flops,
            moved=self.moved + other.moved,
            calls=self.calls + other.calls,
        )

    def times(self, factor: float) -> "Work":
        """So many times as much."""
        return Work(flops=self.flops * factor, moved=self.moved * factor, calls=self.calls * factor)

    def seconds(self, rates: Rates) -> float:
        """On a device that reaches these rates."""
        return (
            self.flops * rates.seconds_per_flop
            + self.moved * rates.seconds_per_byte
            + self.calls * rates.seconds_per_call
        )


def spare_padding(num_parameters: int, device: str) -> int:
    """Padded tokens that are worth another forward, as the trainer has it."""
    return max(64, int(SPARE_OPERATIONS[device] / (6 * num_parameters)))


def plan_steps(
    rows: Sequence[RowTokens], *, batch_size: int, max_tokens: int, spare: int
) -> StepRows:
    """The average step over rows that come in length buckets, split as the trainer splits them.

    Args:
        rows: All of a file, or a sample.
        batch_size: Rows a step.
        max_tokens: Padded tokens of a micro-batch.
        spare: Padding worth another micro-batch.
    """
    ordered = sorted(RowTokens(max(r.read - 1, 1), min(r.learned, r.read)) for r in rows)
    steps = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    micros = [m for step in steps for m in _split(step, max_tokens, spare)]
    sizes = [MicroSize(len(m), m[-1].read, sum(r.learned for r in m)) for m in micros]
    n = len(ordered) / batch_size
    largest = max(sizes, key=lambda size: (size.tokens, size.supervised))
    return StepRows(
        rows=batch_size,
        tokens=sum(size.tokens for size in sizes) / n,
        real_tokens=sum(r.read for r in rows) / n,
        supervised=sum(size.supervised for size in sizes) / n,
        pairs=sum(size.tokens * size.width for size in sizes) / n,
        micros=len(sizes) / n,
        largest=(largest.rows, largest.width, max(size.supervised for size in sizes)),
    )


def forward_work(
    shape: ModelShape, rows: StepRows, layer_bytes: float, adapter_parameters: int = 0
) -> Work:
    """One forward over the rows; the head reads the supervised positions alone."""
    matrices = shape.matrix_parameters * shape.active_share + adapter_parameters
    attention = 4 * shape.num_heads * shape.head_size * shape.num_layers * rows.pairs
    return Work(
        flops=2 * matrices * rows.tokens
        + attention
        + 2 * shape.head_size_parameters * rows.supervised,
        moved=TRAFFIC / 3 * layer_bytes * shape.num_layers * rows.tokens
        + 4 * shape.vocab_size * rows.supervised,
        calls=shape.num_layers * rows.micros,
    )


def step_work(shape: ModelShape, trained: Trained, rows: StepRows, layer_bytes: float) -> Work:
    """Forward and backward over the rows of a step; without the update."""
    adapters = trained.parameters if trained.is_lora else 0
    forward = forward_work(shape, rows, layer_bytes, adapters)
    passed = trained.top_layers / max(shape.num_layers, 1)
    # Gradients of inputs cost a forward; those of weights another, where the weights are trained.
    backward = 2.0 if not trained.is_lora else 1.0
    head = 2 * shape.head_size_parameters * rows.supervised
    body = forward.flops - head
    flops = forward.flops + backward * passed * body + backward * head
    moved = forward.moved
    if trained.is_lora:
        flops += passed * 2 * adapters * rows.tokens
        moved += 4 * ADAPTER_TRAFFIC * rows.tokens * adapters / max(trained.rank, 1)
    if trained.checkpointing:
        flops += passed * body
    again = 1 + passed * (2 + float(trained.checkpointing))
    return Work(flops=flops, moved=moved * again, calls=forward.calls * again)


def update_work(trained: Trained) -> Work:
    """Clipping and the optimiser's step."""
    return Work(moved=float(UPDATE_BYTES * trained.parameters))


def num_steps(num_rows: int, batch_size: int, n_epochs: int) -> int:
    """Steps of so many epochs, the last one of each possibly smaller."""
    return n_epochs * math.ceil(num_rows / batch_size)


def _split(step: Sequence[RowTokens], max_tokens: int, spare: int) -> list[list[RowTokens]]:
    micros: list[list[RowTokens]] = []
    real = 0
    for row in step:
        if micros:
            padded = (len(micros[-1]) + 1) * row.read
            if padded <= max_tokens and padded - real - row.read <= spare:
                micros[-1].append(row)
                real += row.read
                continue
        micros.append([row])
        real = row.read
    return micros
