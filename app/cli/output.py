"""What goes to the terminal: results to standard output, everything else to standard error."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def show(text: str) -> None:
    """Prints a result as it stands, for people and scripts alike."""
    out.print(text, markup=False)


def tell(text: str) -> None:
    """Prints an explanation beside the result."""
    err.print(text, markup=False)


def complain(text: str) -> None:
    """Prints an error."""
    err.print("error:", style="bold red", end=" ")
    err.print(text, markup=False)


def show_json(value: object) -> None:
    """Prints a value as JSON."""
    show(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows under their headings; a missing value is a dash."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    out.print(table, markup=False, soft_wrap=False)


def local_time(seconds: Any) -> str | None:  # noqa: ANN401 - a field of an answer
    """A Unix time as a local date and time."""
    if not isinstance(seconds, int | float):
        return None
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
