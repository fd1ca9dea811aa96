"""Multipart uploads, written to a temporary file as they come: never in memory, never over the limit."""

import os
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import anyio.to_thread
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.limits import DRAIN_BYTES, drain
from app.errors import BadRequest, RetainError, TooLarge
from app.services.compression import Inflater

MAX_FIELD_BYTES: Final = 4096
MAX_FIELDS: Final = 16
OVERHEAD_BYTES: Final = 2**17  # boundaries, headers and fields beside the file
FLUSH_BYTES: Final = 2**20


@dataclass(slots=True)
class Upload:
    """A file on local disk, which goes when the request is over, and the form's other fields."""

    path: Path
    filename: str
    fields: dict[str, str]


async def receive_upload(
    request: Request,
    directory: Path,
    *,
    max_bytes: int,
    too_large: Callable[[int], TooLarge],
    part: str = "file",
) -> Upload:
    """Reads a form with one file, its body plain or as gzip; whatever fails, nothing stays on disk.

    Args:
        request: With its body unread.
        directory: Where the temporary file is made.
        max_bytes: Of the file.
        too_large: Makes the error of a file over the limit.
        part: Name of the part that is the file.

    Raises:
        BadRequest: Not a form, or one without a file.
        TooLarge: The file is over the limit.
    """
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > max_bytes + OVERHEAD_BYTES:
        await discard_body(request)
        raise too_large(max_bytes)
    target, path = _open_temporary(directory)
    chunks = request.stream()
    try:
        with target:
            form = _Form(target, _boundary(request, part), max_bytes, part)
            await form.read(_decode(request, chunks, max_bytes, part), too_large)
        return Upload(path, form.filename_of_file(), form.fields)
    except RetainError:
        remove(path)
        await _skip(chunks)
        raise
    except BaseException:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Removes a temporary file, if it is still there."""
    path.unlink(missing_ok=True)


async def _decode(
    request: Request, chunks: AsyncIterator[bytes], max_bytes: int, part: str
) -> AsyncIterator[bytes]:
    """The body as it was before the sender compressed it, in bounded pieces."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        async for chunk in chunks:
            yield chunk
        return
    if encoding not in {"gzip", "x-gzip"}:
        raise BadRequest("content-encoding: only gzip is known here.", "content-encoding")
    inflater = Inflater(max_bytes + OVERHEAD_BYTES, param=part)
    async for chunk in chunks:
        pieces = inflater.feed(chunk)
        while piece := await anyio.to_thread.run_sync(next, pieces, b""):
            yield piece
    for piece in inflater.finish():
        yield piece


async def _skip(chunks: AsyncIterator[bytes]) -> None:
    """Reads the rest and throws it away, so that the sender gets to see the answer."""
    left = DRAIN_BYTES
    async for chunk in chunks:
        left -= len(chunk)
        if left <= 0:
            return


def _open_temporary(directory: Path) -> tuple[BinaryIO, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=directory, prefix="upload-")
    return os.fdopen(handle, "wb"), Path(name)


@dataclass(slots=True)
class _Part:
    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)


class _Form:
    """The state of one form while its bytes come in."""

    def __init__(self, target: BinaryIO, boundary: bytes, max_bytes: int, name: str) -> None:
        self.fields: dict[str, str] = {}
        self._name = name
        self._target = target
        self._max_bytes = max_bytes
        self._filename: str | None = None
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._buffer = bytearray()
        self._file_bytes = 0
        self._has_ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._grow(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._grow(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": lambda data, start, end: self._take(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def read(
        self, chunks: AsyncIterator[bytes], too_large: Callable[[int], TooLarge]
    ) -> None:
        """Takes the whole body in."""
        total = 0
        async for chunk in chunks:
            total += len(chunk)
            try:
                self._parser.write(chunk)
            except MultipartParseError:
                raise self._refuse("The body is not a valid multipart form.") from None
            if self._file_bytes > self._max_bytes or total > self._max_bytes + OVERHEAD_BYTES:
                raise too_large(self._max_bytes)
            if len(self._buffer) >= FLUSH_BYTES:
                await anyio.to_thread.run_sync(self._flush)
        self._flush()
        if not self._has_ended:
            raise self._refuse("The multipart form ends before its last boundary.")

    def filename_of_file(self) -> str:
        """The name that came with the file.

        Raises:
            BadRequest: There was no file.
        """
        if self._filename is None:
            name = self._name
            raise self._refuse(f"{name}: the form has no part called '{name}' with a filename.")
        return self._filename

    def _refuse(self, problem: str) -> BadRequest:
        return BadRequest(problem, self._name)

    def _flush(self) -> None:
        self._target.write(self._buffer)
        self._buffer.clear()

    def _begin_part(self) -> None:
        self._part = _Part()

    def _grow(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if len(self._header[which]) > MAX_FIELD_BYTES:
            raise self._refuse("The multipart form has a header that is too long.")

    def _end_header(self) -> None:
        # The parser of options wants Latin-1 and gives the bytes back; in UTF-8 most of the world's names failed.
        name, value = (bytes(part).decode("latin-1") for part in self._header)
        self._part.headers[name.lower()] = value
        self._header = (bytearray(), bytearray())

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._part.headers.get("content-disposition", ""))
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            return
        if self._part.name != self._name or self._filename is not None:
            name = self._name
            raise self._refuse(f"{name}: send exactly one file, in the part called '{name}'.")
        # The name is text to show; no path is ever made of it.
        self._filename = self._part.filename = filename.decode("utf-8", "replace")

    def _take(self, data: bytes) -> None:
        if self._part.filename is not None:
            self._file_bytes += len(data)
            if self._file_bytes <= self._max_bytes:
                self._buffer += data
            return
        self._part.data += data
        if len(self._part.data) > MAX_FIELD_BYTES or len(self.fields) >= MAX_FIELDS:
            raise BadRequest(
                f"{self._part.name[:80]}: the field is too long, or the form has too many.",
                self._part.name[:80] or None,
            )

    def _end_part(self) -> None:
        if self._part.filename is None:
            self.fields[self._part.name] = bytes(self._part.data).decode("utf-8", "replace")

    def _end(self) -> None:
        self._has_ended = True


def _boundary(request: Request, part: str) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        names = "the parts 'file' and 'purpose'" if part == "file" else f"the part '{part}'"
        raise BadRequest(f"Send multipart/form-data with {names}.", part)
    return boundary


async def discard_body(request: Request) -> None:
    """Reads an unwanted body and throws it away, so that the sender gets to see the answer."""
    await drain(request.receive)
