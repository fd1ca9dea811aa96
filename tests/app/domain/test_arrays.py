"""JSON arrays are read element by element, as `json.loads` would read them."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import arrays
from app.domain.arrays import iter_elements
from app.domain.jsonlines import MAX_LINE_BYTES
from app.errors import BadRequest

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


def read(text: bytes) -> list[Any]:
    found = list(iter_elements(io.BytesIO(text)))
    assert [place for place, _ in found] == list(range(1, len(found) + 1))
    return [json.loads(element) for _, element in found]


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 50))
def test_elements_are_those_of_the_array_wherever_chunks_end(
    array: list[Any], indent: int | None, is_ascii: bool, chunk: int
) -> None:
    text = json.dumps(array, indent=indent, ensure_ascii=is_ascii).encode()
    before = arrays.CHUNK_BYTES
    arrays.CHUNK_BYTES = chunk  # type: ignore[misc] # as small as chunks of a file never are
    try:
        assert read(text) == array
    finally:
        arrays.CHUNK_BYTES = before  # type: ignore[misc]


def test_an_element_over_the_limit_is_refused_without_reading_on() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            self.taken += size
            return b'["' + b"x" * size if self.taken == size else b"x" * size

    source = Endless()
    with pytest.raises(BadRequest, match="longer than"):
        list(iter_elements(source))  # type: ignore[arg-type]
    assert source.taken < 2 * MAX_LINE_BYTES
