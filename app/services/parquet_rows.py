"""`python -m app.services.parquet_rows SOURCE TARGET MAX_BYTES`: a Parquet file's rows as JSON lines.

A process of its own, with bounds of memory and time that the system keeps: a small file can claim terabytes.
"""

import base64
import json
import resource
import sys
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from app.domain.foreign import choose_columns
from app.domain.jsonlines import MAX_LINE_BYTES, MAX_LINES

MEMORY_BYTES: Final = 2 * 2**30  # address space, of which the libraries alone map about 1 GiB
CPU_SECONDS: Final = 300
ROWS_AT_ONCE: Final = 32
EXIT_REFUSED: Final = 3


class Refused(ValueError):
    """What a client is told of the file."""


def main(arguments: list[str]) -> int:
    """Writes the rows, then one line on standard output that says what was left out."""
    source, target, max_bytes, kind = arguments
    _bound("RLIMIT_AS", MEMORY_BYTES)
    _bound("RLIMIT_CPU", CPU_SECONDS)
    _bound("RLIMIT_FSIZE", int(max_bytes) + 2**20)
    try:
        ignored = write_rows(Path(source), Path(target), int(max_bytes), all_columns=kind == "all")
    except Refused as refused:
        sys.stdout.write(json.dumps({"refused": str(refused)}))
        return EXIT_REFUSED
    except MemoryError:
        sys.stdout.write(json.dumps({"refused": "it takes too much memory to read"}))
        return EXIT_REFUSED
    sys.stdout.write(json.dumps({"ignored_columns": ignored}))
    return 0


def write_rows(source: Path, target: Path, max_bytes: int, *, all_columns: bool) -> list[str]:
    """Writes each row as a line of JSON, and gives the columns that were left out.

    Raises:
        Refused: No Parquet, no columns that make rows, or more than the limits allow.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(source)
        names = list(table.schema_arrow.names)
        columns = names if all_columns else choose_columns(names)
        if columns is None:
            shown = ", ".join(names[:20])
            raise Refused(
                "its columns make no training rows: there has to be `messages`, `conversations`,"
                " `instruction` with `output`, `prompt` with `completion`, `text`, or `input` with"
                f" `preferred_output` and `non_preferred_output`; it has {shown[:400]}"
            )
        if table.metadata.num_rows > MAX_LINES:
            raise Refused(f"more than {MAX_LINES:,} rows")
        with target.open("w", encoding="utf-8") as file:
            left = max_bytes
            for row in _rows(table, columns):
                line = json.dumps(row, ensure_ascii=False, default=_as_json) + "\n"
                left -= len(line.encode())
                if left < 0:
                    raise Refused(f"its rows are larger than the limit of {max_bytes:,} bytes")
                file.write(line)
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Refused(f"not a Parquet file that can be read: {text}") from None
    except UnicodeError:
        raise Refused("a text in it is not UTF-8") from None
    return [name for name in names if name not in columns]


def _rows(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - untyped library
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
        if batch.nbytes > 2 * ROWS_AT_ONCE * MAX_LINE_BYTES:
            raise Refused(f"rows of more than {MAX_LINE_BYTES:,} bytes")
        yield from batch.to_pylist()


def _as_json(value: object) -> object:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return float(value)
    raise Refused(f"a value of type {type(value).__name__}, which JSON has not")


def _bound(name: str, value: int) -> None:
    which = getattr(resource, name)
    _, hard = resource.getrlimit(which)
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (limit, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
