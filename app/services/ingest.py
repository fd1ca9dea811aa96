"""What an upload holds, brought to JSON lines: gzip, JSON arrays, Parquet, ShareGPT and Alpaca."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from app.domain.arrays import iter_elements
from app.domain.digests import file_sha256
from app.domain.foreign import Layout, NotConvertible, convert_row, find_layout
from app.domain.jsonlines import (
    INVALID_ROW,
    MAX_LINE_BYTES,
    number_lines,
    parse_object,
    read_lines,
)
from app.domain.preview import Conversion, Tally
from app.domain.rows import RowFormat, parse_row, row_format
from app.errors import BadRequest, TooLarge
from app.services.compression import MAGIC as GZIP
from app.services.compression import gunzip

PARQUET: Final = b"PAR1"
PARQUET_SECONDS: Final = 600.0
PARAM: Final = "file"
INSTALL_PARQUET: Final = (
    "file: Parquet is read with pyarrow, which this server lacks: install it with"
    " `pip install 'retain[parquet]'`, or upload JSON lines."
)


@dataclass(frozen=True, slots=True)
class Ingested:
    """A local file of JSON lines, and what was done to get it; None when it came like that."""

    path: Path
    conversion: Conversion | None


@dataclass(slots=True)
class _Received:
    """How far taking apart has come."""

    path: Path
    compression: str | None = None
    container: str = "jsonl"
    ignored_columns: tuple[str, ...] = ()


@contextmanager
def ingest(
    source: Path, *, max_bytes: int, converts: bool, scratch: Path | None = None
) -> Iterator[Ingested]:
    """A received file as JSON lines, for the length of a `with` block.

    Args:
        source: As it came.
        max_bytes: Of whatever is made of it, each step for itself.
        converts: Rows of other layouts become chat rows, and rows that cannot are dropped and counted; else
            whatever rows there are stay as they are.
        scratch: Where temporary files are made; None: the system's place.

    Raises:
        BadRequest: Damaged, or no row of it can be used.
        TooLarge: It is over the limit once decompressed or converted.
    """
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="ingest-") as name:
        directory = Path(name)
        received = _Received(source)
        if _starts(source) == GZIP:
            received.path, received.compression = directory / "unpacked", "gzip"
            gunzip(source, received.path, max_bytes=max_bytes)
            if _starts(received.path) == GZIP:
                raise BadRequest("file: gzip within gzip; compress it once.", PARAM, "invalid_gzip")
        _open_container(received, directory, max_bytes, converts=converts)
        tally = Tally()
        layout = _first_layout(received) if converts else Layout.NATIVE
        if layout is not Layout.NATIVE or received.container != "jsonl":
            target = directory / "rows.jsonl"
            _convert(received, target, tally, layout if converts else None, max_bytes)
            yield Ingested(target, _describe(source, received, tally, layout))
        elif received.compression is not None:
            yield Ingested(received.path, _describe(source, received, tally, layout))
        else:
            yield Ingested(source, None)


def _starts(path: Path, count: int = 2) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _open_container(
    received: _Received, directory: Path, max_bytes: int, *, converts: bool
) -> None:
    if _starts(received.path, 4) == PARQUET:
        target = directory / "table.jsonl"
        received.ignored_columns = _read_parquet(
            received.path, target, max_bytes, all_columns=not converts
        )
        received.path, received.container = target, "parquet"
    elif _starts(received.path, 64).lstrip()[:1] == b"[":
        received.container = "json"


def _read_parquet(
    source: Path, target: Path, max_bytes: int, *, all_columns: bool
) -> tuple[str, ...]:
    """Has another process read the table; its environment holds no secrets."""
    if importlib.util.find_spec("pyarrow") is None:
        raise BadRequest(INSTALL_PARQUET, PARAM, "parquet_unavailable")
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    command = [sys.executable, "-m", "app.services.parquet_rows"]
    arguments = [str(source), str(target), str(max_bytes), "all" if all_columns else "training"]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [*command, *arguments],
            cwd=Path(__file__).parents[2],
            env=kept | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PARQUET_SECONDS,
            check=False,
        )
        told = json.loads(done.stdout or b"{}")
    except (subprocess.TimeoutExpired, ValueError):
        told = {}
    if "ignored_columns" in told:
        return tuple(told["ignored_columns"])
    problem = told.get("refused", "reading it took too much memory or time")
    raise BadRequest(f"file: {problem}.", PARAM, "invalid_parquet")


def _first_layout(received: _Received) -> Layout:
    """What the first row is written in; a first row that is no row is for the check to refuse."""
    with received.path.open("rb") as file:
        for number, line in _numbered(file, received):
            try:
                return find_layout(parse_object(line, line_number=number, param=PARAM))
            except BadRequest:
                return Layout.NATIVE
    return Layout.NATIVE


def _numbered(file: BinaryIO, received: _Received) -> Iterator[tuple[int, bytes | str]]:
    if received.container == "json":
        return iter_elements(file, param=PARAM)
    return number_lines(read_lines(file), param=PARAM)


def _convert(
    received: _Received, target: Path, tally: Tally, layout: Layout | None, max_bytes: int
) -> None:
    """Writes the rows that can be used; without a layout all of them as they are."""
    wanted: RowFormat | None = None
    left = max_bytes
    with received.path.open("rb") as file, target.open("wb") as out:
        for number, line in _numbered(file, received):
            row = parse_object(line, line_number=number, param=PARAM)
            try:
                written, found = _convert_row(row, layout, wanted, number)
            except NotConvertible as problem:
                tally.drop(number, str(problem))
                continue
            wanted = found
            left -= len(written)
            if left < 0:
                raise TooLarge(
                    f"file: converted it is larger than the limit of {max_bytes:,} bytes.", PARAM
                )
            out.write(written)
            tally.keep(json.loads(written))
    if not tally.num_kept:
        first = tally.dropped[0] if tally.dropped else None
        why = "it has none" if first is None else f"line {first.line}: {first.reason}"
        raise BadRequest(f"file: no row can be used; {why}", PARAM, INVALID_ROW)


def _convert_row(
    row: dict[str, Any], layout: Layout | None, wanted: RowFormat | None, number: int
) -> tuple[bytes, RowFormat | None]:
    """The line of a converted row, and its format."""
    converted = row if layout is None else convert_row(row, layout)
    line = json.dumps(converted, ensure_ascii=False).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise NotConvertible(f"longer than {MAX_LINE_BYTES:,} bytes")
    if layout is None:
        return line, None
    try:
        found = row_format(parse_row(line, line_number=number, param=PARAM))
    except BadRequest as refused:
        text = refused.message.removeprefix(f"{PARAM} line {number}: ")
        raise NotConvertible(text) from None
    if wanted is not None and found is not wanted:
        raise NotConvertible(f"is a {found} row in a file of {wanted} rows")
    return line, found


def _describe(source: Path, received: _Received, tally: Tally, layout: Layout) -> Conversion:
    return Conversion(
        layout=layout,
        container=received.container,
        compression=received.compression,
        received_bytes=source.stat().st_size,
        received_sha256=file_sha256(source),
        num_read=tally.num_read,
        num_kept=tally.num_kept,
        num_dropped=tally.num_dropped,
        reasons=tally.reasons,
        dropped=tuple(tally.dropped),
        ignored_columns=received.ignored_columns,
        preview=tuple(tally.preview),
    )
