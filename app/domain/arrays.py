"""One JSON array of a file, element by element, without ever holding more than a few of them."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from app.domain.jsonlines import INVALID_ROW, MAX_LINE_BYTES, MAX_LINES
from app.errors import BadRequest

CHUNK_BYTES: Final = 2**18
_SPACE = re.compile(r"[ \t\r\n]*")


def iter_elements(file: BinaryIO, *, param: str = "file") -> Iterator[tuple[int, str]]:
    """Each element of the array as its JSON text, with its place from 1.

    Args:
        file: At its start.
        param: The request field that named it.

    Raises:
        BadRequest: Not one JSON array in UTF-8, an element over 1 MiB, or too many of them.
    """
    reader = _Reader(file, param)
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        reader.expect_end()
        return
    place = 1
    while True:
        yield place, reader.element(place)
        if reader.peek() == "]":
            reader.take("]")
            reader.expect_end()
            return
        reader.take(",")
        place += 1
        if place > MAX_LINES:
            raise BadRequest(f"{param}: more than {MAX_LINES:,} rows", param, INVALID_ROW)


class _Reader:
    """The text of a file from where one stands, a buffer of it at a time."""

    def __init__(self, file: BinaryIO, param: str) -> None:
        self._file = file
        self._param = param
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scanner = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._has_ended = False

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = self._at if found is None else found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> None:
        """Steps over one character."""
        if self.peek() != wanted:
            raise self._refuse(f"not a JSON array: '{wanted}' is missing")
        self._at += 1

    def expect_end(self) -> None:
        """Only space may follow."""
        if self.peek():
            raise self._refuse("something follows the JSON array")

    def element(self, place: int) -> str:
        """The next element's text."""
        self.peek()
        while True:
            try:
                _, end = self._scanner.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_long = len(self._text) - self._at > MAX_LINE_BYTES
                if is_long or not self._more():
                    what = f"longer than {MAX_LINE_BYTES:,} bytes" if is_long else error.msg
                    raise self._refuse(f"row {place} is not JSON: {what}") from None
                continue
            except (RecursionError, ValueError):
                raise self._refuse(
                    f"row {place}: nested too deeply, or too long a number"
                ) from None
            if end == len(self._text) and self._more():
                continue  # a number may go on
            found, self._at = self._text[self._at : end], end
            return found

    def _more(self) -> bool:
        if self._has_ended:
            return False
        chunk = self._file.read(CHUNK_BYTES)
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            raise self._refuse("not UTF-8") from None
        self._has_ended = not chunk
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(chunk)

    def _refuse(self, problem: str) -> BadRequest:
        return BadRequest(f"{self._param}: {problem}", self._param, INVALID_ROW)
