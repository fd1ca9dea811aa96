"""What is said of a job's data when it is submitted: token counts, lengths against the context, findings."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

from app.domain.conversations import ChatRow, PreferenceRow
from app.domain.frozen import Frozen
from app.domain.overlap import normalise
from app.domain.preview import Conversion
from app.domain.row_checks import LISTED_LINES, Lines, RowChecks
from app.domain.rows import CompletionRow, Row

TURN_TOKENS: Final = 4  # what a template puts around a turn


class DataFinding(Frozen):
    """Something the owner of a file should know; `lines` are the first ones, from 1."""

    code: str
    param: str
    message: str
    count: int
    lines: tuple[int, ...] = ()


class TokenBucket(Frozen):
    """Rows of about at most so many tokens, and above the bucket before."""

    up_to_tokens: int
    num_rows: int


class CheckedData(Frozen):
    """One file of a job; tokens are estimated from bytes, and counted when the job starts."""

    param: str
    file: str
    num_rows: int
    estimated_tokens: int
    bytes_per_token: float
    max_seq_length: int
    rows_over_length: int  # at least about so many are cut
    lengths: tuple[TokenBucket, ...]


class DataChecks(Frozen):
    """Of all files of a job."""

    files: tuple[CheckedData, ...] = ()
    findings: tuple[DataFinding, ...] = ()


def measure(
    checks: RowChecks,
    *,
    param: str,
    file: str,
    num_rows: int,
    bytes_per_token: float,
    max_seq_length: int,
) -> CheckedData:
    """A file's lengths in tokens, held against what the job trains on at once."""
    over = 0
    buckets = []
    for bucket in checks.lengths:
        if _tokens(bucket.shortest_bytes, bytes_per_token) > max_seq_length:
            over += bucket.num_rows
        up_to = _tokens(bucket.up_to_bytes, bytes_per_token)
        buckets.append(TokenBucket(up_to_tokens=up_to, num_rows=bucket.num_rows))
    return CheckedData(
        param=param,
        file=file,
        num_rows=num_rows,
        estimated_tokens=math.ceil(checks.text_bytes / bytes_per_token) + TURN_TOKENS * num_rows,
        bytes_per_token=bytes_per_token,
        max_seq_length=max_seq_length,
        rows_over_length=over,
        lengths=tuple(buckets),
    )


def find_in_file(
    checks: RowChecks, measured: CheckedData, conversion: Conversion | None
) -> list[DataFinding]:
    """What one file's owner should know."""
    param = measured.param
    found = []
    if checks.duplicates.count:
        found.append(
            _tell(
                "duplicate_rows",
                param,
                checks.duplicates,
                "repeats an earlier row, and so counts more",
                "repeat an earlier row, and so count more",
            )
        )
    if checks.empty_answers.count:
        found.append(
            _tell(
                "empty_answers",
                param,
                checks.empty_answers,
                "has an answer of white space alone: the model learns to say nothing",
                "have an answer of white space alone: the model learns to say nothing",
            )
        )
    if checks.identical_pairs.count:
        found.append(
            _tell(
                "identical_pairs",
                param,
                checks.identical_pairs,
                "compares an answer with itself, and will be left out",
                "compare an answer with itself, and will be left out",
            )
        )
    if measured.rows_over_length:
        found.append(
            DataFinding(
                code="rows_over_length",
                param=param,
                message=(
                    f"{param}: at least about {measured.rows_over_length:,} of {measured.num_rows:,} rows are longer"
                    f" than max_seq_length {measured.max_seq_length:,} (estimated at"
                    f" {measured.bytes_per_token:.1f} bytes a token) and will be cut; the longest is line"
                    f" {checks.longest_line}."
                ),
                count=measured.rows_over_length,
                lines=(checks.longest_line,),
            )
        )
    if conversion is not None and conversion.num_dropped:
        lines = tuple(row.line for row in conversion.dropped[:LISTED_LINES])
        found.append(
            _tell(
                "rows_dropped",
                param,
                Lines(count=conversion.num_dropped, lines=lines),
                "was dropped when the file was converted; the file says why",
                "were dropped when the file was converted; the file says why",
            )
        )
    return found


class KnownRows:
    """The rows of a training file, whole and by their questions alone, after normalisation."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._wholes: set[str] = set()
        self._questions: set[str] = set()
        for row in rows:
            whole, question = _parts(row)
            self._wholes.add(whole)
            if question:
                self._questions.add(question)

    def find_leaks(self, rows: Iterable[tuple[int, Row]], param: str) -> list[DataFinding]:
        """Rows of another file that are among these: the loss on them says nothing of new text."""
        wholes, questions = [], []
        for line, row in rows:
            whole, question = _parts(row)
            if whole in self._wholes:
                wholes.append(line)
            elif question and question in self._questions:
                questions.append(line)
        found = []
        if wholes:
            found.append(
                _tell(
                    "validation_in_training",
                    param,
                    _lines(wholes),
                    "is in training_file too: what it measures may be learned by heart",
                    "are in training_file too: what they measure may be learned by heart",
                )
            )
        if questions:
            found.append(
                _tell(
                    "validation_questions_in_training",
                    param,
                    _lines(questions),
                    "asks what a row of training_file asks, with another answer",
                    "ask what rows of training_file ask, with other answers",
                )
            )
        return found


def _parts(row: Row) -> tuple[str, str]:
    if isinstance(row, PreferenceRow):
        row = row.preferred
    if isinstance(row, ChatRow):
        turns = [(turn.role, turn.content or "") for turn in row.messages]
        asked = [text for role, text in turns if role in {"user", "tool"}]
        return normalise(" ".join(text for _, text in turns)), normalise(" ".join(asked))
    if isinstance(row, CompletionRow):
        return normalise(f"{row.prompt} {row.completion}"), normalise(row.prompt)
    return normalise(row.text), ""


def _lines(lines: Sequence[int]) -> Lines:
    return Lines(count=len(lines), lines=tuple(lines[:LISTED_LINES]))


def _tell(code: str, param: str, where: Lines, one: str, many: str) -> DataFinding:
    listed = ", ".join(map(str, where.lines))
    more = where.count - len(where.lines)
    rest = f" and {more:,} more" if more else ""
    what = f"1 row {one}" if where.count == 1 else f"{where.count:,} rows {many}"
    return DataFinding(
        code=code,
        param=param,
        message=f"{param}: {what} (line{'s' if where.count > 1 else ''} {listed}{rest}).",
        count=where.count,
        lines=where.lines,
    )


def _tokens(size_bytes: int, bytes_per_token: float) -> int:
    return math.ceil(size_bytes / bytes_per_token) + TURN_TOKENS
