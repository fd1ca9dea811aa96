"""Lengths of a job's rows as estimates need them: what is read of a file in the store, in tokens by its bytes."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from app.db.models import File
from app.domain.conversations import ChatRow, Message, PreferenceRow
from app.domain.estimates_job import RowSample
from app.domain.estimates_work import RowTokens
from app.domain.jsonlines import read_lines
from app.domain.rows import CompletionRow, Row, TextRow, iter_rows
from app.errors import BadRequest
from app.services.storage import Storage

#: What is read of a file at most; its first rows stand for the others.
MAX_READ_BYTES: Final = 2_000_000
#: A row of a file that does not lie in the store, or that has no good line.
GUESSED_ROW: Final = (400, 200)
#: Tokens that a template adds to a turn.
TURN_TOKENS: Final = 4


class RowBytes(NamedTuple):
    """A row: bytes of its text, of what is learned of it, and its turns."""

    read: int
    learned: int
    turns: int
    learned_turns: int


class FileBytes(NamedTuple):
    """The rows at a file's beginning."""

    rows: tuple[RowBytes, ...]
    share_read: float  # of the file's bytes
    a_line: int = 1  # of them come from a line: two from a pair


def measure_rows(storage: Storage, file: File) -> FileBytes:
    """What the first rows of a stored file have; kept by the file's digest.

    No transaction should be open while a large file is read from far away; at most two megabytes are.
    """
    return _measure(storage, file.path, file.sha256, file.size_bytes)


def sample_tokens(
    found: FileBytes, *, num_rows: int, bytes_per_token: float, max_tokens: int
) -> RowSample:
    """The rows in tokens.

    Args:
        found: Of the file.
        num_rows: Lines it has.
        bytes_per_token: Of text, in the base model's tokens.
        max_tokens: Rows are cut there.
    """
    rows = []
    for row in found.rows:
        read = math.ceil(row.read / bytes_per_token) + TURN_TOKENS * row.turns
        learned = math.ceil(row.learned / bytes_per_token) + row.learned_turns
        read = min(max(read, 2), max_tokens)
        rows.append(RowTokens(read, min(max(learned, 1), read - 1)))
    return RowSample(rows=tuple(rows), num_rows=num_rows * found.a_line)


def guess_bytes_per_token(vocab_size: int | None) -> float:
    """Of text, before a run has told: one for a vocabulary of bytes, about four for 32,000 entries."""
    if vocab_size is None:
        return 4.0
    return min(max(1.0, 1.0 + 0.64 * math.log(vocab_size / 300)), 5.0)


@lru_cache(maxsize=256)
def _measure(storage: Storage, path: str, sha256: str, size_bytes: int) -> FileBytes:  # noqa: ARG001 - the key
    found: list[tuple[RowBytes, ...]] = []
    read = 0
    if storage.exists(path):
        with storage.open(path) as source:
            lines = _Counted(read_lines(source))
            found = [_bytes_of(row) for row in _good_rows(lines)]
            read = lines.size_bytes
    if not found:
        return FileBytes((RowBytes(*GUESSED_ROW, 1, 1),), 0.0)
    rows = tuple(itertools.chain.from_iterable(found))
    return FileBytes(rows, min(read / max(size_bytes, 1), 1.0), len(found[0]))


class _Counted:
    """Lines until so many bytes were given."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self.size_bytes += len(line)
            yield line
            if self.size_bytes >= MAX_READ_BYTES:
                return


def _good_rows(lines: _Counted) -> Iterator[Row]:
    """Rows up to the first bad line, which the check of the file names."""
    with contextlib.suppress(BadRequest):
        for _, row in iter_rows(lines):
            yield row


def _bytes_of(row: Row) -> tuple[RowBytes, ...]:
    """Of what is read of a row: one conversation or text, or the two of a pair."""
    if isinstance(row, PreferenceRow):
        return _bytes_of_one(row.preferred), _bytes_of_one(row.rejected)
    return (_bytes_of_one(row),)


def _bytes_of_one(row: ChatRow | CompletionRow | TextRow) -> RowBytes:
    match row:
        case ChatRow():
            texts = [(_text_bytes(message), message.is_learned) for message in row.messages]
            return RowBytes(
                sum(size for size, _ in texts),
                sum(size for size, is_learned in texts if is_learned),
                len(texts),
                sum(is_learned for _, is_learned in texts),
            )
        case CompletionRow():
            completion = len(row.completion.encode())
            return RowBytes(len(row.prompt.encode()) + completion, completion, 0, 1)
        case TextRow():
            size = len(row.text.encode())
            return RowBytes(size, size, 0, 1)


def _text_bytes(message: Message) -> int:
    calls = message.tool_calls or ()
    said = "" if message.content is None else message.content
    return len(said.encode()) + sum(len(call.model_dump_json()) for call in calls)
