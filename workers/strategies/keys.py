"""Unit keys: their length, which of them stand for the rest, and how alike candidates and entries are."""

# Shape letters: N entries, C candidates, D width of a key.

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

APART = -2.0  # in place of a cosine, of what is never compared


def unit(keys_ND: Tensor) -> Tensor:
    """Keys of length 1; a key of zeros stays."""
    lengths_N1: Tensor = keys_ND.norm(dim=1, keepdim=True)
    return keys_ND / lengths_N1.clamp_min(1e-12)


def herd(keys_ND: Tensor, count: int) -> list[int]:
    """Indices in the order of herding: each next one brings the running mean closest to the whole mean.

    Argmin over what is left of |mu - (S + phi) / (j + 1)| (iCaRL, Rebuffi et al. 2017, algorithm 4), ties
    to the lower index, in float64.
    """
    phi_ND = keys_ND.double()
    mean_D = phi_ND.mean(0) if len(phi_ND) else torch.zeros(0)
    total_D = torch.zeros_like(mean_D)
    squares_N = (phi_ND * phi_ND).sum(1)
    taken_N = torch.zeros(len(phi_ND), dtype=torch.float64)
    order: list[int] = []
    for count_after in range(1, min(count, len(phi_ND)) + 1):
        # |a - phi / n|^2 without its constant |a|^2, where a = mu - S / n: one product a step
        missing_D = mean_D - total_D / count_after
        gain_N = squares_N / count_after**2 - 2 * (phi_ND @ missing_D) / count_after
        best = int((gain_N + taken_N).argmin())
        taken_N[best] = torch.inf
        total_D += phi_ND[best]
        order.append(best)
    return order


class Similarities:
    """Of a block's candidates with the entries, kept right while candidates become entries."""

    def __init__(self, sims_CN: NDArray[np.float32], sims_CC: NDArray[np.float32]) -> None:
        room = np.full((len(sims_CN), len(sims_CC)), APART, np.float32)
        self._sims = np.concatenate([sims_CN, room], axis=1)
        self._among = sims_CC

    def highest(self, index: int) -> float:
        """Of a candidate with anything that is an entry by now."""
        return float(self._sims[index].max()) if self._sims.shape[1] else APART

    def put(self, place: int, index: int) -> None:
        """A candidate became the entry at a place."""
        self._sims[:, place] = self._among[:, index]
