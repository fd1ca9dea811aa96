"""Lists of right and wrong answers as short text."""

import numpy as np
from numpy.typing import NDArray


def pack_bits(values: NDArray[np.bool_]) -> str:
    """Hex digits, and the count in front of them."""
    return f"{len(values)}:{np.packbits(values).tobytes().hex()}"


def unpack_bits(packed: str) -> NDArray[np.bool_]:
    """The inverse of `pack_bits`."""
    count, digits = packed.split(":")
    raw = np.frombuffer(bytes.fromhex(digits), np.uint8)
    return np.unpackbits(raw)[: int(count)].astype(bool)
