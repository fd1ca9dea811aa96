"""Merging adapters on the changes that they make, never on their factors.

With dW_j = scale_j * B_j A_j and weights w_j (card 3, equations):

- `cat`: sum_j w_j dW_j exactly, its rank the sum of the ranks (A's and weighted B's side by side).
- `svd`: the same sum, cut to the nearest matrix of a given rank (Eckart-Young).
- `ties` (Yadav 2023): each dW_j keeps the share `density` of its entries that are largest in magnitude; an
  entry's sign is that of sum_j w_j dW_j; its value is the mean, weighted by |w_j|, of the entries that agree
  with that sign. Libraries differ here: peft elects before it weights and divides by the count.
- `dare` (Yu 2024): every entry is kept with probability `density` and divided by it, then summed as by `cat`:
  the expectation is that sum.
"""

# Shape letters: R rank, I inputs and O outputs of an adapted layer.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["cat", "svd", "ties", "dare"]


@dataclass(frozen=True)
class Factors:
    """A low-rank change scale * B A, in float32."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Of the factors; the change's may be lower."""
        return int(self.A_RI.shape[0])

    def change(self) -> Tensor:
        """The change itself, (O, I)."""
        return self.scale * (self.B_OR @ self.A_RI)


@dataclass(frozen=True)
class Merged:
    """A merged change as factors of scale 1, and what cutting its rank took away.

    Args:
        factors: Of the merged change.
        squared_norm: Of the change that was to be represented.
        squared_error: Of what the factors lack of it.
    """

    factors: Factors
    squared_norm: float
    squared_error: float


def combine(
    adapters: Sequence[Factors],
    method: Method,
    *,
    weights: Sequence[float],
    density: float = 0.5,
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> Merged:
    """The adapters of one layer as one.

    Args:
        adapters: At least one.
        method: See the module.
        weights: One an adapter.
        density: Share of entries kept by `ties` and `dare`, in (0, 1].
        rank: Of the result; None takes the first adapter's for `svd` and the sum of all for the others, which
            is exact for `cat`. Never above min(O, I) where the rank is cut.
        generator: Of `dare`; on the CPU.

    Raises:
        ValueError: Weights and adapters differ in number, `density` is out of range, or `dare` has no generator.
    """
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density: {density} is not above 0 and at most 1")
    total = sum(factors.rank for factors in adapters)
    joined = cat(adapters, weights)
    if method == "cat":
        if rank is None or rank >= total:
            squared = float(joined.change().double().square().sum())
            return Merged(joined, squared, 0.0)
        return _cut_factors(joined, rank)
    if method == "svd":
        return _cut_factors(joined, rank or adapters[0].rank)
    changes = [factors.change() for factors in adapters]
    if method == "ties":
        change = ties(changes, weights, density=density)
    elif generator is None:
        raise ValueError("dare needs a generator")
    else:
        change = dare(changes, weights, density=density, generator=generator)
    return _cut(change, rank or total)


def cat(adapters: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_j w_j dW_j, exactly: factors side by side, the weights and scales in B."""
    return Factors(
        torch.cat([f.A_RI for f in adapters]),
        torch.cat([f.B_OR * (w * f.scale) for f, w in zip(adapters, weights, strict=True)], dim=1),
    )


def trim(change: Tensor, density: float) -> Tensor:
    """The share `density` of the entries with the largest magnitudes, at least one; the others are 0."""
    kept = max(1, round(density * change.numel()))
    if kept >= change.numel():
        return change
    flat = change.reshape(-1)
    places = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view_as(change)


def ties(changes: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Trim, elect, and mean of what agrees; see the module."""
    trimmed = torch.stack([trim(change, density) for change in changes])
    w = torch.tensor(weights, dtype=trimmed.dtype, device=trimmed.device)
    w = w.view(-1, *[1] * changes[0].ndim)
    weighted = w * trimmed
    elected = weighted.sum(0).sign()
    agrees = (weighted.sign() == elected) & (weighted != 0)
    mass = (w.abs() * agrees).sum(0)
    return (weighted * agrees).sum(0) / mass.clamp(min=torch.finfo(mass.dtype).tiny)


def dare(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """Drop at random, rescale, and sum; see the module. Density 1 keeps everything as it is."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        drawn = torch.rand(change.shape, generator=generator).to(change.device)
        total += weight * torch.where(drawn < density, change / density, 0.0)
    return total


def _cut_factors(factors: Factors, rank: int) -> Merged:
    """The nearest change of a rank, by the SVD of a small core: B A = Q_B (R_B R_A') Q_A'."""
    Q_B, R_B = torch.linalg.qr(factors.B_OR.double() * factors.scale)
    Q_A, R_A = torch.linalg.qr(factors.A_RI.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return _pack(Q_B @ U, S, Vh @ Q_A.T, rank, factors.A_RI.dtype)


def _cut(change: Tensor, rank: int) -> Merged:
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    return _pack(U, S, Vh, rank, change.dtype)


def _pack(U: Tensor, S: Tensor, Vh: Tensor, rank: int, dtype: torch.dtype) -> Merged:
    """Factors of the leading part, each with the square roots of the singular values; padded with zeros."""
    kept = min(rank, S.numel())
    roots = S[:kept].sqrt()
    A_RI = Vh.new_zeros(rank, Vh.shape[1])
    B_OR = U.new_zeros(U.shape[0], rank)
    A_RI[:kept] = roots[:, None] * Vh[:kept]
    B_OR[:, :kept] = U[:, :kept] * roots
    squared = S.square()
    return Merged(
        Factors(A_RI.to(dtype), B_OR.to(dtype)), float(squared.sum()), float(squared[kept:].sum())
    )


def relative_error(parts: Sequence[Merged]) -> float:
    """Over the layers of a model: the norm of what cutting took away, relative to that of the change."""
    norm = sum(part.squared_norm for part in parts)
    return math.sqrt(sum(part.squared_error for part in parts) / norm) if norm else 0.0
