"""Which setting of a method is reported: the one that its search, on a seed of its own, found best."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.benchmarks.board.cells import Cache, Cell
from tests.benchmarks.board.packing import unpack_bits

SEARCH_SEED = 100  # its base model, rows and order are used by no other part of the board
SEARCH_STAGES = 2


def merit(result: dict[str, Any]) -> float:
    """Harmonic mean of the final accuracy over the domains and of exact match on the unseen skills.

    It is one number for every method alike, and low where either side is.
    """
    last = result["points"][-1]
    domain = float(np.mean([unpack_bits(packed).mean() for packed in last["domains"]]))
    general = float(unpack_bits(last["unseen_em"]).mean())
    return 2 * domain * general / max(domain + general, 1e-9)


def choose(cache: Cache, cells: Sequence[Cell]) -> int:
    """The place of the setting with the highest merit among those that are done; 0 without any."""
    merits = [
        float("-inf") if (result := cache.load(cell)) is None else merit(result) for cell in cells
    ]
    return int(np.argmax(merits)) if merits else 0


def is_complete(cache: Cache, cells: Sequence[Cell]) -> bool:
    """Whether every setting has a result."""
    return all(cache.load(cell) is not None for cell in cells)
