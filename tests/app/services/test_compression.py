"""Gzip within bounds: what a bomb may cost, and streams that come in any pieces."""

import gzip
import io
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import BadRequest, TooLarge
from app.services.compression import PIECE_BYTES, RATIO_FREE_BYTES, Inflater, gunzip

BOMB_BYTES = 2**26


def make_bomb(path: Path) -> None:
    """Spaces, a thousandth of them when packed."""
    packer = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        for _ in range(BOMB_BYTES // PIECE_BYTES):
            file.write(packer.compress(b" " * PIECE_BYTES))
        file.write(packer.flush())


@pytest.mark.parametrize(("limit", "most"), [(2**31, 2**25), (3 * 2**20, 3 * 2**20)])
def test_a_bomb_costs_bounded_memory_and_disk(tmp_path: Path, limit: int, most: int) -> None:
    bomb, target = tmp_path / "bomb.gz", tmp_path / "out"
    make_bomb(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge) as refused:
            gunzip(bomb, target, max_bytes=limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.code == "decompressed_too_large"
    assert peak < 8 * 2**20
    assert (
        target.stat().st_size <= most
    )  # by the ratio long before an ample limit, else by the limit


def test_text_that_repeats_itself_passes_while_it_is_short(tmp_path: Path) -> None:
    source, target = tmp_path / "in.gz", tmp_path / "out"
    text = b"x" * RATIO_FREE_BYTES
    source.write_bytes(gzip.compress(text))
    gunzip(source, target, max_bytes=RATIO_FREE_BYTES)
    assert target.read_bytes() == text


@given(
    texts=st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    size=st.integers(1, 40),
    padding=st.integers(0, 9),
)
def test_members_in_any_pieces_give_what_was_packed(
    texts: list[bytes], size: int, padding: int
) -> None:
    packed = io.BytesIO(b"".join(gzip.compress(text) for text in texts) + b"\0" * padding)
    inflater = Inflater(10_000, param="file")
    found = b""
    while chunk := packed.read(size):
        found += b"".join(inflater.feed(chunk))
    assert found + b"".join(inflater.finish()) == b"".join(texts)


@given(cut=st.integers(1, 60))
def test_a_stream_that_ends_early_is_refused(cut: int) -> None:
    packed = gzip.compress(b"some text " * 5)
    inflater = Inflater(10_000, param="data")
    with pytest.raises(BadRequest) as refused:
        list(inflater.feed(packed[: -min(cut, len(packed))])) + list(inflater.finish())
    assert (refused.value.param, refused.value.code) == ("data", "invalid_gzip")
