"""Shared mathematics of the strategies, as functions of tensors."""

# Shape letters: N tokens, V vocabulary, O output features, I input features, R adapter rank.

import math
from collections.abc import Mapping, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from workers.strategies.base import LoraPair, Pull

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
CHUNK = 1 << 15  # elements; four float32 arrays of it stay in a core's second-level cache


def wide(values: Tensor) -> Tensor:
    """At least float32: half precision loses the tails of logits, and small differences of weights."""
    return values.float() if values.dtype.itemsize < 4 else values


def quadratic_penalty(theta: Tensor, anchor: Tensor, importance: Tensor | None) -> Tensor:
    """Half of sum importance * (theta - anchor)^2; the strength is the caller's."""
    offset = wide(theta) - anchor
    weighted = offset if importance is None else offset * importance
    return 0.5 * (weighted * offset).sum()


def quadratic_gradient(theta: Tensor, anchor: Tensor, importance: Tensor | None) -> Tensor:
    """Gradient of `quadratic_penalty`: importance * (theta - anchor)."""
    offset = theta.to(anchor.dtype) - anchor
    return offset if importance is None else offset.mul_(importance)


def layerwise_scale(task_gradient: Tensor, pull_gradient: Tensor, rho: float) -> Tensor:
    """min(1, rho |g| / |pull|): a cap that only ever shrinks the pull; keeps the minimiser for rho > 1 (LARS-like)."""
    pull = torch.linalg.vector_norm(pull_gradient)
    cap = rho * torch.linalg.vector_norm(task_gradient)
    return torch.where(pull > cap, cap / pull.clamp_min(1e-30), torch.ones_like(pull))


def apply_pulls(
    params: Mapping[str, nn.Parameter],
    pulls: Sequence[Mapping[str, Pull]],
    learning_rates: Mapping[str, float],
) -> None:
    """One implicit step over the summed pulls of all strategies, in place (hook 13a).

    theta <- theta + lr * sum_k c_k (a_k - theta) / (1 + lr * sum_k c_k), with c_k = strength * importance:
    the fixed point of the implicit Euler step of the quadratic pulls, stable for any strength.

    Args:
        params: Trainable parameters by canonical name.
        pulls: One mapping a strategy, by parameter name.
        learning_rates: Rate of each parameter in this step.
    """
    with torch.no_grad():
        for name, parameter in params.items():
            own = [mapping[name] for mapping in pulls if name in mapping]
            if own:
                _pull_one(parameter, own, learning_rates[name])


def _pull_one(parameter: nn.Parameter, pulls: Sequence[Pull], rate: float) -> None:
    """In chunks, so that what is computed between stays in cache: the step is bound by memory."""
    flat = parameter.data.view(-1) if parameter.is_contiguous() else parameter.data.reshape(-1)
    anchors = [pull.anchor.reshape(-1) for pull in pulls]
    importances = [None if p.importance is None else p.importance.reshape(-1) for p in pulls]
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        if len(pulls) == 1:
            moved = _pull_alone(
                flat[part], anchors[0][part], _part(importances[0], part), rate * pulls[0].strength
            )
            _meter(pulls[0], moved)
            continue
        coefficients = [
            torch.full_like(flat[part], rate * pull.strength, dtype=torch.float32)
            if importance is None
            else importance[part] * (rate * pull.strength)
            for pull, importance in zip(pulls, importances, strict=True)
        ]
        total = torch.stack(coefficients).sum(0).add_(1.0)
        moves = [
            (anchor[part] - flat[part]).mul_(coefficient).div_(total)
            for anchor, coefficient in zip(anchors, coefficients, strict=True)
        ]
        for pull, move in zip(pulls, moves, strict=True):
            _meter(pull, move)
        flat[part] += torch.stack(moves).sum(0)
    if not parameter.is_contiguous():
        parameter.data.copy_(flat.view_as(parameter))


def _pull_alone(
    theta: Tensor, anchor: Tensor, importance: Tensor | None, strength: float
) -> Tensor:
    """The step for a single pull; returns the displacement."""
    moved = anchor - theta
    if importance is None:
        moved.mul_(strength / (1.0 + strength))
    else:
        weight = importance * strength
        moved.mul_(weight).div_(weight.add_(1.0))
    theta += moved
    return moved


def _part(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _meter(pull: Pull, moved: Tensor) -> None:
    if pull.applied_sq is not None:
        pull.applied_sq.add_(torch.dot(moved, moved))


def factored_penalty(pair: LoraPair, rows_O: Tensor | None, columns_I: Tensor | None) -> Tensor:
    """Half of sum_ij u_i v_j (dW_ij)^2 for dW = scale * B A, without forming dW.

    Equals scale^2 / 2 * tr(B' diag(u) B . A diag(v) A'); None means ones, which gives |dW|_F^2 / 2.
    It depends on the product B A alone: (B R, R^-1 A) has the same value.
    """
    left_RR, right_RR = _gram(pair, rows_O, columns_I)
    return 0.5 * pair.scale**2 * (left_RR * right_RR.T).sum()


def factored_gradients(
    pair: LoraPair, rows_O: Tensor | None, columns_I: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `factored_penalty` with respect to A and B, in O((O + I) R^2)."""
    left_RR, right_RR = _gram(pair, rows_O, columns_I)
    square = pair.scale**2
    grad_A = square * (left_RR @ pair.lora_A.detach())
    grad_B = square * (pair.lora_B.detach() @ right_RR)
    if columns_I is not None:
        grad_A = grad_A * columns_I
    if rows_O is not None:
        grad_B = grad_B * rows_O[:, None]
    return grad_A, grad_B


def _gram(pair: LoraPair, rows_O: Tensor | None, columns_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """B' diag(u) B and A diag(v) A'."""
    lora_A, lora_B = pair.lora_A.detach(), pair.lora_B.detach()
    weighted_B = lora_B if rows_O is None else lora_B * rows_O[:, None]
    weighted_A = lora_A if columns_I is None else lora_A * columns_I
    return lora_B.T @ weighted_B, weighted_A @ lora_A.T


def divergence(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    kind: Divergence,
    temperature: float,
    beta: float = 0.5,
    rescale: bool = True,
) -> Tensor:
    """Divergence of teacher p and student q, summed over tokens, in nats times temperature squared.

    `forward_kl` is KL(p || q), `reverse_kl` KL(q || p); `jsd` is beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q, divided by beta (1 - beta) when `rescale`, so that it tends to the two KLs at
    the ends instead of to 0 (Agarwal 2024). The square of the temperature keeps the gradient's scale (Hinton 2015).

    Args:
        student_NV: Logits of the model in training.
        teacher_NV: Logits of the frozen starting model, without gradient.
        kind: Which divergence.
        temperature: Above 0.
        beta: Of `jsd`, between 0 and 1.
        rescale: Of `jsd`.
    """
    student = torch.log_softmax(wide(student_NV) / temperature, -1)
    teacher = torch.log_softmax(wide(teacher_NV) / temperature, -1)
    match kind:
        case "forward_kl":
            return _kl(teacher, student) * temperature**2
        case "reverse_kl":
            return _kl(student, teacher) * temperature**2
        case "jsd":
            mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
            value = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
            scale = beta * (1 - beta) if rescale else 1.0
            return value * (temperature**2 / scale)
        case _:
            assert_never(kind)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()
