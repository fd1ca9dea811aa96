"""The k likeliest tokens of each position with the mass of all others, and the divergence from them."""

# Shape letters: N positions, K kept tokens, V vocabulary.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_LOGITS = 2**19  # values in work at once: stays in a core's cache


@dataclass(frozen=True)
class TopK:
    """Distributions of N positions; the kept tokens and the bucket of all others add up to 1."""

    ids_NK: Tensor  # int64
    log_p_NK: Tensor  # float32 or wider, over the whole vocabulary
    log_tail_N: Tensor  # log of the mass of all other tokens; -inf where there are none


def keep_top(logits_NV: Tensor, k: int, temperature: float) -> TopK:
    """The k likeliest tokens of each position, with log-probabilities over the whole vocabulary.

    The tail's mass is the logsumexp of its own logits: 1 minus the sum of the kept gives 0 where the truth
    is 3e-9.

    Args:
        logits_NV: Of the teacher.
        k: At most V are kept.
        temperature: Above 0; divides the logits.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in logits_NV.split(_chunk_rows(logits_NV)):
        scaled = chunk.to(wide) / temperature
        kept, ids = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
        log_tail, total = _tail_and_total(scaled, ids, kept)
        parts.append((ids, kept - total[:, None], log_tail - total))
    ids, log_p, log_tail = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return TopK(ids, log_p, log_tail)


def bucketed_kl_sum(
    student_NV: Tensor, kept: TopK, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sum over positions of T^2 * KL(teacher || student) with all tokens outside the top k as one.

    sum over the kept of p log(p / q) + alpha log(alpha / alpha_q), where alpha and alpha_q are the tails'
    masses. It is 0 where the student is the teacher, and below the whole KL by alpha * KL of the tails; its
    gradient is the whole KL's on the kept ids, and q_j (1 - alpha / alpha_q) on the others.

    Args:
        student_NV: Logits of the model in training.
        kept: Of the teacher, at the same temperature.
        temperature: Above 0.

    Returns:
        The sum in nats, and the squared norm of its gradient with respect to the student's logits.

    Raises:
        ValueError: There is not one distribution for each position.
    """
    if len(student_NV) != len(kept.ids_NK):
        raise ValueError(f"{len(kept.ids_NK)} distributions for {len(student_NV)} positions")
    value, squared = _BucketedKl.apply(  # type: ignore[no-untyped-call]
        student_NV, kept.ids_NK, kept.log_p_NK, kept.log_tail_N, temperature
    )
    return value, squared


class _BucketedKl(torch.autograd.Function):
    """`bucketed_kl_sum` with its closed-form gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_NV: Tensor,
        ids_NK: Tensor,
        log_p_NK: Tensor,
        log_tail_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(student_NV.dtype, torch.float32)
        gradient_NV = torch.empty_like(student_NV)
        value = student_NV.new_zeros((), dtype=wide)
        squared = torch.zeros_like(value)
        rows = _chunk_rows(student_NV)
        parts = (x.split(rows) for x in (student_NV, gradient_NV, ids_NK, log_p_NK, log_tail_N))
        for student, gradient, ids, log_p, log_tail in zip(*parts, strict=True):
            losses, slope = _bucketed(student.to(wide) / temperature, ids, log_p, log_tail)
            value += losses.sum() * temperature**2
            slope *= temperature
            squared += (slope * slope).sum()
            gradient.copy_(slope)
        context: Any = ctx
        context.save_for_backward(gradient_NV)
        context.mark_non_differentiable(squared)
        return value, squared

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_value: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        context: Any = ctx
        (gradient_NV,) = context.saved_tensors
        return gradient_NV * grad_value.to(gradient_NV.dtype), None, None, None, None


def _bucketed(
    scaled: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor
) -> tuple[Tensor, Tensor]:
    """Bucketed KL of each position and its gradient with respect to `scaled`, whose values are lost."""
    kept = scaled.gather(-1, ids)
    log_tail_q, total = _tail_and_total(scaled, ids, kept)
    log_q = kept - total[:, None]
    log_ratio = log_tail - (log_tail_q - total)
    alpha = log_tail.exp()
    has_tail = alpha > 0
    # x log x is 0 at 0, where the difference of the logarithms is no number
    of_tail = torch.where(has_tail, alpha * log_ratio, torch.zeros_like(alpha))
    p = log_p.exp()
    losses = (p * (log_p - log_q)).sum(-1) + of_tail
    shrink = torch.where(has_tail, 1.0 - log_ratio.exp(), torch.ones_like(alpha))
    slope = scaled.sub_(total[:, None]).exp_().mul_(shrink[:, None])
    slope.scatter_(-1, ids, log_q.exp() - p)
    return losses, slope


def _tail_and_total(scaled: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp over all but the kept ids, which are set to -inf in place, and over everything."""
    scaled.scatter_(-1, ids, float("-inf"))
    log_tail = torch.logsumexp(scaled, -1)
    return log_tail, torch.logaddexp(log_tail, torch.logsumexp(kept, -1))


def _chunk_rows(values_NV: Tensor) -> int:
    return max(CHUNK_LOGITS // max(values_NV.shape[-1], 1), 1)
