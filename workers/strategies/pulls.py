"""Quadratic pulls of parameters toward anchors, and what is measured of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TALLY_INTERVAL = 20  # steps


@dataclass
class Tally:
    """What a quadratic penalty does in a step, measured every 20th step: it costs as much as the pull.

    Steps 0 and 1 are measured, too: at step 0 a gradient's pull is still 0. Tensors stay on their device until they are read.
    """

    squared_norms: list[Tensor] = field(default_factory=list)
    penalties: list[Tensor] = field(default_factory=list)
    capped: list[Tensor] = field(default_factory=list)  # 1 for a block whose cap bound, else 0
    last: dict[str, float] = field(default_factory=dict)  # of the last measured step

    def begin(self, step: int, strength: float) -> "Tally | None":
        """The tally to fill in during this step; None in steps that are not measured."""
        self.read()
        if strength <= 0:
            self.last = {}
            return None
        return self if not self.last or step % TALLY_INTERVAL == 1 else None

    def read(self) -> dict[str, float]:
        """`applied_norm`, `penalty` and, where blocks can be capped, `capped_share`."""
        if self.squared_norms:
            self.last = {
                "applied_norm": _total(self.squared_norms) ** 0.5,
                "penalty": _total(self.penalties),
            }
            if self.capped:
                self.last["capped_share"] = _total(self.capped) / len(self.capped)
            self.squared_norms, self.penalties, self.capped = [], [], []
        return self.last or {"applied_norm": 0.0, "penalty": 0.0}

    def save(self) -> dict[str, float]:
        """What a resumed run needs to measure the same steps."""
        self.read()
        return dict(self.last)


@dataclass(frozen=True)
class Pull:
    """A quadratic pull (13a) of one parameter toward `anchor` with coefficient `strength * importance`.

    The loop sums all pulls of a parameter into one implicit step
    theta <- (theta + lr * sum_k c_k a_k) / (1 + lr * sum_k c_k), stable for any strength.
    """

    strength: float
    importance: Tensor | None  # shape of the parameter, float32; None means 1 everywhere
    anchor: Tensor
    tally: Tally | None = None  # of the strategy; filled in while the pull is applied
    applied_sq: Tensor | None = None  # scalar; the squared displacement by this pull is added to it


def _total(parts: Sequence[Tensor]) -> float:
    return float(torch.stack(list(parts)).double().sum()) if parts else 0.0
