"""What a file of training rows is like beyond being valid: repeated rows, empty answers, lengths."""

import math
from collections import Counter
from typing import Final

from pydantic import Field

from app.domain.frozen import Frozen

LISTED_LINES: Final = 20
STEPS_A_DOUBLING: Final = 4  # of the histogram: neighbouring bounds are 19 % apart
#: Rows whose hashes are remembered, about 70 bytes each; of a longer file the first ones.
MAX_REMEMBERED: Final = 500_000


class Lines(Frozen):
    """How many lines, and the first of them, from 1."""

    count: int = 0
    lines: tuple[int, ...] = ()


class LengthBucket(Frozen):
    """Rows of at most so many bytes of text, and above the bucket before."""

    shortest_bytes: int  # that is in it
    up_to_bytes: int
    num_rows: int


class RowChecks(Frozen):
    """The findings in one file."""

    duplicates: Lines = Lines()  # rows equal to an earlier one
    empty_answers: Lines = Lines()  # rows with nothing to learn but white space in some answer
    identical_pairs: Lines = Lines()  # preference rows whose two answers are the same
    text_bytes: int = 0
    longest_bytes: int = 0
    longest_line: int = 0
    lengths: tuple[LengthBucket, ...] = ()
    duplicates_sought_in: int = Field(default=0, ge=0)  # rows: the first ones


class RowTally:
    """Takes rows as they are read; memory stays bounded."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._duplicates = _Lines()
        self._empty = _Lines()
        self._identical = _Lines()
        self._steps: Counter[int] = Counter()
        self._shortest: dict[int, int] = {}  # of each step
        self._text_bytes = self._longest = self._longest_line = self._num_rows = 0

    def take(
        self,
        line: int,
        *,
        key: object,
        size_bytes: int,
        has_empty_answer: bool,
        read_bytes: int | None = None,
        is_identical: bool = False,
    ) -> None:
        """One row.

        Args:
            line: From 1.
            key: Equal for equal rows; hashable.
            size_bytes: Of its text.
            has_empty_answer: Something to learn in it is but white space.
            read_bytes: What is read of it, where that is more.
            is_identical: It compares an answer with itself.
        """
        self._num_rows += 1
        digest = hash(key)
        if digest in self._seen:
            self._duplicates.add(line)
        elif len(self._seen) < MAX_REMEMBERED:
            self._seen.add(digest)
        if has_empty_answer:
            self._empty.add(line)
        if is_identical:
            self._identical.add(line)
        self._text_bytes += size_bytes if read_bytes is None else read_bytes
        if size_bytes > self._longest:
            self._longest, self._longest_line = size_bytes, line
        step = _step(size_bytes)
        self._steps[step] += 1
        self._shortest[step] = min(size_bytes, self._shortest.get(step, size_bytes))

    def finish(self) -> RowChecks:
        """What was found."""
        return RowChecks(
            duplicates=self._duplicates.show(),
            empty_answers=self._empty.show(),
            identical_pairs=self._identical.show(),
            text_bytes=self._text_bytes,
            longest_bytes=self._longest,
            longest_line=self._longest_line,
            lengths=tuple(
                LengthBucket(
                    shortest_bytes=self._shortest[step],
                    up_to_bytes=_bound(step),
                    num_rows=count,
                )
                for step, count in sorted(self._steps.items())
            ),
            duplicates_sought_in=min(self._num_rows, MAX_REMEMBERED + self._duplicates.count),
        )


class _Lines:
    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, line: int) -> None:
        self.count += 1
        if len(self._first) < LISTED_LINES:
            self._first.append(line)

    def show(self) -> Lines:
        return Lines(count=self.count, lines=tuple(self._first))


def _step(size_bytes: int) -> int:
    step = math.ceil(STEPS_A_DOUBLING * math.log2(max(size_bytes, 1)))
    return step if _bound(step) >= size_bytes else step + 1


def _bound(step: int) -> int:
    return math.floor(2 ** (step / STEPS_A_DOUBLING))
