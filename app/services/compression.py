"""Gzip taken apart within bounds: so many bytes, so many times what came, never more than a piece in memory."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from app.errors import BadRequest, TooLarge

MAGIC: Final = b"\x1f\x8b"
PIECE_BYTES: Final = 2**20
#: Text compresses 3 to 20 times; deflate's most is about 1,030, which only bombs come near.
MAX_RATIO: Final = 200
RATIO_FREE_BYTES: Final = 2**20  # short files may be as repetitive as they like


class Inflater:
    """Decompresses one gzip stream, of one member or several, as it comes.

    Args:
        max_bytes: Of what comes out.
        param: The request field that is compressed.
    """

    def __init__(self, max_bytes: int, *, param: str) -> None:
        self._max_bytes = max_bytes
        self._param = param
        self._stream = zlib.decompressobj(wbits=31)
        self._bytes_in = self._bytes_out = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What the next compressed bytes hold, in pieces of at most 1 MiB.

        Raises:
            BadRequest: Not gzip, or damaged; code `invalid_gzip`.
            TooLarge: More comes out than is allowed; code `decompressed_too_large`.
        """
        self._bytes_in += len(data)
        while data:
            if self._stream.eof:
                data = self._next_member(data)
                if not data:
                    return
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise self._damaged("is damaged or no gzip") from None
            self._bytes_out += len(piece)
            self._check_bounds()
            if piece:
                yield piece
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    def finish(self) -> Iterator[bytes]:
        """What is left when the last byte has come.

        Raises:
            BadRequest: The stream ends before its end.
        """
        while not self._stream.eof:
            piece = self._stream.decompress(b"", PIECE_BYTES)
            if not piece:
                raise self._damaged("ends early")
            self._bytes_out += len(piece)
            self._check_bounds()
            yield piece

    def _next_member(self, data: bytes) -> bytes:
        rest = data.lstrip(b"\0")  # some writers pad with zeros
        if rest:
            self._stream = zlib.decompressobj(wbits=31)
        return rest

    def _check_bounds(self) -> None:
        if self._bytes_out > self._max_bytes:
            raise TooLarge(
                f"{self._param}: decompressed it is larger than the limit of {self._max_bytes:,} bytes.",
                self._param,
                "decompressed_too_large",
            )
        if self._bytes_out > max(RATIO_FREE_BYTES, MAX_RATIO * self._bytes_in):
            raise TooLarge(
                f"{self._param}: it decompresses to more than {MAX_RATIO} times its size.",
                self._param,
                "decompressed_too_large",
            )

    def _damaged(self, what: str) -> BadRequest:
        return BadRequest(f"{self._param}: the gzip stream {what}.", self._param, "invalid_gzip")


def gunzip(source: Path, target: Path, *, max_bytes: int, param: str = "file") -> None:
    """Decompresses a file; memory stays at a piece, disk at `max_bytes`.

    Raises:
        BadRequest: Not gzip, or damaged.
        TooLarge: More comes out than is allowed.
    """
    inflater = Inflater(max_bytes, param=param)
    with source.open("rb") as packed, target.open("wb") as unpacked:
        while chunk := packed.read(2**16):
            unpacked.writelines(inflater.feed(chunk))
        unpacked.writelines(inflater.finish())
