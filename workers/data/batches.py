"""Which rows a step reads, how they are split into micro-batches, and the tensors of one micro-batch."""

# Shape letters: B rows, T tokens, N supervised positions of a micro-batch.

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.strategies.batch import Micro, Stream

DOMAIN = "domain"
MEGABATCH_BATCHES = (
    50  # rows are sorted by length within this many batches, then batches are shuffled
)
WINDOW_ROWS = 64  # of a matched stream's epoch order, among which the best length is taken


class Rows(Protocol):
    """What is needed of a tokenised store."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        ...

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Token ids of a row and the loss weight of each token as a target."""
        ...


class DrawnRow(NamedTuple):
    """One row of a step: the stream it was drawn for and where it lies."""

    source: str
    store: str
    row: int
    is_task: bool


class RowSampler:
    """Draws the rows of each step; its whole state is `state()`, plain JSON.

    Every stream goes through its rows in epochs, each row once an epoch, in an order that follows from
    (seed, stream, epoch): turning a stream on or off leaves the order of the others as it was. The domain
    stream comes in length buckets; other streams take the rows whose lengths match those of the step's
    domain rows, and their cumulative count is exact by error diffusion. A uniform stream draws each step's
    rows by its own count of such steps; its epochs go on later from where they stood.
    """

    def __init__(
        self, *, seed: int, batch_size: int, lengths: Mapping[str, NDArray[np.int64]]
    ) -> None:
        self._seed = seed
        self._batch_size = batch_size
        self._lengths = dict(lengths)
        self._cursors: dict[str, dict[str, Any]] = {}
        self._orders: dict[str, tuple[tuple[int, int], NDArray[np.int64]]] = {}

    def draw(self, streams: Sequence[Stream]) -> tuple[DrawnRow, ...]:
        """The rows of the next step."""
        drawn: list[DrawnRow] = []
        targets: list[int] = []
        for stream in sorted(streams, key=lambda s: (s.name != DOMAIN, s.name)):
            if not stream.rows:
                continue
            cursor = self._cursors.setdefault(
                stream.key,
                {"epoch": 0, "position": 0, "lead": 0, "due": 0.0, "given": 0, "window": []},
            )
            cursor["due"] += stream.rows_per_step * self._batch_size
            count = round(cursor["due"]) - cursor["given"]
            cursor["given"] += count
            if stream.is_uniform:
                rows = self._draw_uniformly(stream, cursor, count)
            elif stream.name == DOMAIN:
                rows = self._draw_bucketed(stream, cursor, count)
            else:
                rows = self._draw_matched(stream, cursor, count, targets)
            if stream.name == DOMAIN:
                targets = sorted(int(self._lengths[stream.store][row]) for row in rows)
            drawn += [
                DrawnRow(stream.name, stream.store, row, stream.counts_as_task) for row in rows
            ]
        return tuple(drawn)

    def add_store(self, store: str, lengths: NDArray[np.int64]) -> None:
        """Makes a store known that a strategy made while the run was under way."""
        self._lengths[store] = lengths

    def state(self) -> dict[str, Any]:
        """Cursors by stream, as JSON values."""
        return {
            name: {**cursor, "window": list(cursor["window"])}
            for name, cursor in self._cursors.items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up saved cursors."""
        self._cursors = {
            name: {**cursor, "window": list(cursor["window"])} for name, cursor in state.items()
        }

    def _draw_bucketed(self, stream: Stream, cursor: dict[str, Any], count: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < count:
            if cursor["position"] >= len(stream.rows):
                # The new epoch starts with as many rows as this step still lacks, so that its
                # buckets and the steps stay aligned.
                cursor["epoch"] += 1
                cursor["position"] = 0
                cursor["lead"] = count - len(rows)
            order = self._order(stream, cursor["epoch"], cursor["lead"], count)
            taken = order[cursor["position"] : cursor["position"] + count - len(rows)]
            cursor["position"] += len(taken)
            rows += [stream.rows[i] for i in taken]
        return rows

    def _draw_uniformly(self, stream: Stream, cursor: dict[str, Any], count: int) -> list[int]:
        """Rows of one step alone; twice the same only where there are too few."""
        step = cursor["uniform"] = cursor.get("uniform", 0) + 1
        generator = self._generator(f"{stream.key}/uniform/{step}")
        num_rows = len(stream.rows)
        chosen = generator.choice(num_rows, size=count, replace=count > num_rows)
        return [stream.rows[i] for i in chosen]

    def _draw_matched(
        self, stream: Stream, cursor: dict[str, Any], count: int, targets: Sequence[int]
    ) -> list[int]:
        rows: list[int] = []
        lengths = self._lengths[stream.store]
        for k in range(count):
            self._fill_window(stream, cursor)
            window: list[int] = cursor["window"]
            best = 0
            if targets:
                target = targets[int((k + 0.5) * len(targets) / count)]
                best = int(np.argmin([abs(int(lengths[stream.rows[i]]) - target) for i in window]))
            rows.append(stream.rows[window.pop(best)])
        return rows

    def _fill_window(self, stream: Stream, cursor: dict[str, Any]) -> None:
        if not cursor["window"] and cursor["position"] >= len(stream.rows):
            cursor["epoch"] += 1
            cursor["position"] = 0
        missing = min(WINDOW_ROWS - len(cursor["window"]), len(stream.rows) - cursor["position"])
        if missing > 0:
            order = self._order(stream, cursor["epoch"], -1, 0)
            start = cursor["position"]
            cursor["window"] += [int(i) for i in order[start : start + missing]]
            cursor["position"] += missing

    def _order(self, stream: Stream, epoch: int, lead: int, batch: int) -> NDArray[np.int64]:
        """Positions in `stream.rows` in the order of an epoch; `lead` -1 leaves them unbucketed."""
        cached = self._orders.get(stream.key)
        if cached is not None and cached[0] == (epoch, lead):
            return cached[1]
        generator = self._generator(f"{stream.key}/{epoch}")
        order = generator.permutation(len(stream.rows))
        if lead >= 0:
            lengths = self._lengths[stream.store][np.asarray(stream.rows)[order]]
            order = _bucket(order, lengths, lead, batch, generator)
        self._orders[stream.key] = ((epoch, lead), order)
        return order

    def _generator(self, purpose: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed}/{purpose}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def split_micros(
    drawn: Sequence[DrawnRow],
    lengths: Mapping[str, NDArray[np.int64]],
    *,
    max_tokens: int,
    spare_padding: int | None = None,
) -> list[list[DrawnRow]]:
    """Splits a step's rows, sorted by length, into micro-batches of at most `max_tokens` padded tokens.

    A longer row stands alone. Micro-batches are also cut where padding would pass `spare_padding` tokens:
    about what another forward and backward costs beside its tokens (None: never).
    """
    micros: list[list[DrawnRow]] = []
    real = 0
    for row in sorted(drawn, key=lambda r: (fed_length(lengths[r.store][r.row]), r)):
        length = fed_length(lengths[row.store][row.row])
        if micros:
            padded = (len(micros[-1]) + 1) * length
            padding = padded - real - length
            if padded <= max_tokens and (spare_padding is None or padding <= spare_padding):
                micros[-1].append(row)
                real += length
                continue
        micros.append([row])
        real = length
    return micros


def fed_length(length: int) -> int:
    """Tokens of a row that the model reads: its last one is only ever a target."""
    return max(int(length) - 1, 1)


def build_micro(
    rows: Sequence[DrawnRow], stores: Mapping[str, Rows], device: torch.device
) -> Micro:
    """The tensors of one micro-batch, right-padded with token 0."""
    contents = [stores[row.store].row(row.row) for row in rows]
    width = max((fed_length(len(ids)) for ids, _ in contents), default=1)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    positions, targets, owners, weights = [], [], [], []
    for index, (ids, token_weights) in enumerate(contents):
        fed = fed_length(len(ids))
        input_ids[index, :fed] = ids[:fed]
        supervised = np.flatnonzero(token_weights[1:] > 0)  # positions whose next token counts
        positions.append(index * width + supervised)
        targets.append(ids[supervised + 1])
        weights.append(token_weights[supervised + 1])
        owners.append(np.full(supervised.size, index))

    def flat(parts: list[NDArray[Any]], kind: type[np.generic]) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(joined.astype(kind)).to(device)

    return Micro(
        input_ids_BT=torch.from_numpy(input_ids).to(device),
        positions_N=flat(positions, np.int64),
        targets_N=flat(targets, np.int64),
        row_of_N=flat(owners, np.int64),
        weights_N=flat(weights, np.float32),
        sources=tuple(row.source for row in rows),
        sample_ids=tuple(row.row for row in rows),
        is_task_B=torch.tensor([row.is_task for row in rows], dtype=torch.bool, device=device),
    )


def _bucket(
    order: NDArray[np.int64],
    lengths: NDArray[np.int64],
    lead: int,
    batch: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Sorts by length within megabatches and shuffles their batches; ragged ends stay at the ends."""
    head, rest = np.arange(min(lead, len(order))), np.arange(min(lead, len(order)), len(order))
    whole = len(rest) // batch * batch
    batches: list[NDArray[np.int64]] = []
    for start in range(0, whole, MEGABATCH_BATCHES * batch):
        mega = rest[start : min(start + MEGABATCH_BATCHES * batch, whole)]
        mega = mega[np.argsort(lengths[mega], kind="stable")]
        batches += list(mega.reshape(-1, batch))
    shuffled = [batches[i] for i in generator.permutation(len(batches))]
    return order[np.concatenate([head, *shuffled, rest[whole:]]).astype(np.int64)]
