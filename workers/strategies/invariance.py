"""Penalties that ask for invariance: consistency of pairs, V-REx, IRMv1 and CORAL, as functions of tensors."""

# Shape letters: B rows, T tokens, D width, E environments, N positions, V vocabulary, P pairs, R rows of a side.

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.batch import Micro

SMALL = 1e-12
_MASK = 2**64 - 1


def uniform_of(*numbers: int) -> float:
    """A number in [0, 1) that follows from the integers alone (splitmix64 over them).

    A draw that has no state: micro-batches, ranks and resumes don't matter.
    """
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / float(1 << 53)


def widened(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def match_pairs(
    micro: Micro, row_of: Sequence[int], source: str, counterparts: str
) -> tuple[list[int], list[int]]:
    """Rows of a source in a micro-batch whose counterparts are there, too, and where each one's is.

    Args:
        micro: Rows of both sources, and maybe others; a row may occur twice.
        row_of: By row of the source: its counterpart.
        source: Of the rows.
        counterparts: Of theirs.
    """
    waiting: dict[int, deque[int]] = {}
    left, right = [], []
    rows = list(enumerate(zip(micro.sources, micro.sample_ids, strict=True)))
    for place, (name, row) in rows:
        if name == source:
            waiting.setdefault(row_of[row], deque()).append(place)
    for place, (name, row) in rows:
        if name == counterparts and waiting.get(row):
            left.append(waiting[row].popleft())
            right.append(place)
    return left, right


def pool(micro: Micro, hidden_BTD: Tensor, *, last: bool) -> Tensor:
    """Each row's hidden states (B, D): their mean, or the last one.

    A row counts up to its last supervised position: what follows is padding, or text that nothing is learned
    from. A row without one gives its first state.
    """
    rows, width = micro.input_ids_BT.shape
    ends_B = torch.zeros(rows, dtype=torch.int64, device=hidden_BTD.device)
    ends_B.scatter_reduce_(0, micro.row_of_N, micro.positions_N % width, "amax")
    wide_BTD = widened(hidden_BTD)
    if last:
        return wide_BTD[torch.arange(rows, device=ends_B.device), ends_B]
    columns_T = torch.arange(width, device=ends_B.device)
    mask_BT = (columns_T[None] <= ends_B[:, None]).to(wide_BTD.dtype)
    return (wide_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


def consistency(left_PD: Tensor, right_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over pairs of 1 - cos(left, right), and the squared norm of its gradient.

    Symmetric with stop-gradients: half of 1 - cos(left, sg right) and half of 1 - cos(sg left, right), so that
    each side is pulled toward the other as it stands. Equal sides give 0 and no gradient.
    """
    one_way_P = F.cosine_similarity(left_PD, right_PD.detach(), dim=-1)
    other_way_P = F.cosine_similarity(left_PD.detach(), right_PD, dim=-1)
    with torch.no_grad():  # d cos / d h has norm sin / |h|
        sine_sq_P = (1 - one_way_P**2).clamp_min(0)
        inverse_sq_P = sum(1 / h.square().sum(-1).clamp_min(SMALL) for h in (left_PD, right_PD))
        squared_norm = (0.25 * sine_sq_P * inverse_sq_P).sum()
    return (1 - 0.5 * (one_way_P + other_way_P)).sum(), squared_norm


def risk_variance(risks_E: Tensor) -> Tensor:
    """V-REx (Krueger 2021, eq. 7): the population variance of the environments' risks.

    Its derivative is 2 (L_e - mean) / E.
    """
    return (risks_E - risks_E.mean()).square().mean()


def dummy_gradients(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """d/dw of the cross-entropy of w * logits at w = 1, at each position: E_q[z] - z_target.

    The square of its mean over an environment is the penalty of IRMv1 (Arjovsky 2019, eq. 3): this closed
    form needs no second derivative.
    """
    logits_NV = widened(logits_NV)
    expected_N = (logits_NV.softmax(-1) * logits_NV).sum(-1)
    return expected_N - logits_NV.gather(-1, targets_N[:, None]).squeeze(-1)


def coral(left_RD: Tensor, right_RD: Tensor) -> Tensor:
    """|C_left - C_right|_F^2 / (4 D^2) + |m_left - m_right|^2 / D (Sun 2016, eq. 1, and the means).

    The covariances alone don't see that one side is shifted. At least two rows a side.
    """
    width = left_RD.shape[1]
    gap = covariance_gap(left_RD, right_RD)
    means = (left_RD.mean(0) - right_RD.mean(0)).square().sum() / width
    return gap + means


def covariance_gap(left_RD: Tensor, right_RD: Tensor) -> Tensor:
    """|C_left - C_right|_F^2 / (4 D^2), covariances with n - 1."""
    difference = _covariance(left_RD) - _covariance(right_RD)
    return difference.square().sum() / (4 * left_RD.shape[1] ** 2)


def mean_coral(sides: Sequence[Tensor]) -> Tensor:
    """The mean of `coral` over all pairs of environments."""
    values = [
        coral(sides[i], sides[j]) for i in range(len(sides)) for j in range(i + 1, len(sides))
    ]
    return torch.stack(values).mean()


def _covariance(values_RD: Tensor) -> Tensor:
    centred = values_RD - values_RD.mean(0)
    return centred.T @ centred / (values_RD.shape[0] - 1)
