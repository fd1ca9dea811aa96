"""What a conversion did to a file: its first rows as they became, and the rows that were dropped."""

from collections import Counter
from typing import Any, Final

from pydantic import Field

from app.domain.foreign import Layout
from app.domain.frozen import Frozen

PREVIEW_ROWS: Final = 3
PREVIEW_CHARACTERS: Final = 500  # of each text in it
PREVIEW_ENTRIES: Final = 20  # of each list and object in it
LISTED_DROPS: Final = 100
LISTED_REASONS: Final = 20


class DroppedRow(Frozen):
    """A row that could not be used."""

    line: int  # from 1: a line, or a row of an array or a table
    reason: str


class Conversion(Frozen):
    """How a file came, and what became of its rows; the stored contents are the converted ones."""

    layout: Layout
    container: str  # `jsonl`, `json` (one array) or `parquet`
    compression: str | None  # `gzip`
    received_bytes: int
    received_sha256: str
    num_read: int
    num_kept: int
    num_dropped: int
    reasons: dict[str, int] = Field(default_factory=dict)  # how often each, fields without places
    dropped: tuple[DroppedRow, ...] = ()  # the first ones
    ignored_columns: tuple[str, ...] = ()  # of a table
    preview: tuple[dict[str, Any], ...] = ()


class Tally:
    """Counts rows while a file is converted; holds a bounded part of them."""

    def __init__(self) -> None:
        self.num_read = self.num_kept = 0
        self.dropped: list[DroppedRow] = []
        self.preview: list[dict[str, Any]] = []
        self._reasons: Counter[str] = Counter()

    @property
    def num_dropped(self) -> int:
        """Rows that were read and not kept."""
        return self.num_read - self.num_kept

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason occurred, the most frequent first."""
        return dict(self._reasons.most_common(LISTED_REASONS))

    def keep(self, row: dict[str, Any]) -> None:
        """A row was converted."""
        self.num_read += 1
        self.num_kept += 1
        if len(self.preview) < PREVIEW_ROWS:
            self.preview.append({key: shorten(value) for key, value in row.items()})

    def drop(self, line: int, reason: str) -> None:
        """A row was not."""
        self.num_read += 1
        kind = ".".join("*" if part.isdigit() else part for part in reason.split("."))
        if kind in self._reasons or len(self._reasons) < LISTED_REASONS:
            self._reasons[kind] += 1
        else:
            self._reasons["other"] += 1
        if len(self.dropped) < LISTED_DROPS:
            self.dropped.append(DroppedRow(line=line, reason=reason))


def shorten(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """A value cut down to what a preview shows."""
    if isinstance(value, str):
        return value if len(value) <= PREVIEW_CHARACTERS else value[:PREVIEW_CHARACTERS] + "…"
    if isinstance(value, dict):
        return {key: shorten(each) for key, each in list(value.items())[:PREVIEW_ENTRIES]}
    return [shorten(each) for each in value[:PREVIEW_ENTRIES]] if isinstance(value, list) else value
