"""The mathematics that strategies share, as functions of tensors."""

# Shape letters: N positions, V vocabulary, R rank of an adapter, I inputs and O outputs of a linear layer.

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from workers.strategies.base import Pull, Tally

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

CHUNK_ELEMENTS = 1 << 15  # on a CPU: the operands of one element-wise pass stay in its cache
CHUNK_ELEMENTS_DEVICE = 1 << 24
CHUNK_LOGITS = 1 << 20  # logits handled at once by a divergence: bounds its temporaries


class LoraPenalty(NamedTuple):
    """A quadratic penalty of an adapter's effective change, for strength 1, and its gradients."""

    value: Tensor
    grad_A_RI: Tensor
    grad_B_OR: Tensor


def quadratic_penalty(parameter: Tensor, anchor: Tensor, importance: Tensor | None) -> Tensor:
    """1/2 * sum of importance * (parameter - anchor)^2; importance None means 1 everywhere."""
    difference = parameter - anchor
    weighted = difference if importance is None else importance * difference
    return 0.5 * (weighted * difference).sum()


def quadratic_gradient(parameter: Tensor, anchor: Tensor, importance: Tensor | None) -> Tensor:
    """The gradient of `quadratic_penalty`: importance * (parameter - anchor)."""
    difference = parameter - anchor
    return difference if importance is None else difference.mul_(importance)


def lora_penalty(
    lora_A_RI: Tensor,
    lora_B_OR: Tensor,
    scale: float,
    *,
    rows_O: Tensor | None = None,
    columns_I: Tensor | None = None,
) -> LoraPenalty:
    """1/2 * sum over ij of u_i v_j dW_ij^2 with dW = scale * B A, in O((I + O) R^2): dW is never made.

    It equals 1/2 * scale^2 * tr(B' diag(u) B . A diag(v) A'). Being a function of dW it is zero at
    B = 0 and does not change when (B, A) becomes (B M, M^-1 A).

    Args:
        lora_A_RI: Factor on the side of the inputs.
        lora_B_OR: Factor on the side of the outputs.
        scale: Of the adapter.
        rows_O: Importance u of each output; None means 1.
        columns_I: Importance v of each input; None means 1.
    """
    weighted_A = lora_A_RI if columns_I is None else lora_A_RI * columns_I
    weighted_B = lora_B_OR if rows_O is None else lora_B_OR * rows_O[:, None]
    inner_A_RR = weighted_A @ lora_A_RI.T
    inner_B_RR = lora_B_OR.T @ weighted_B
    squared = scale * scale
    return LoraPenalty(
        value=0.5 * squared * (inner_B_RR * inner_A_RR).sum(),
        grad_A_RI=squared * (inner_B_RR @ weighted_A),
        grad_B_OR=squared * (weighted_B @ inner_A_RR),
    )


def layer_cap(gradient_norm: Tensor, pull_norm: Tensor, rho: float) -> Tensor:
    """min(1, rho * |g| / |pull|), a LARS-like factor that only ever shrinks a block's pull.

    For rho > 1 the minimiser stays where it is: there |g| = |pull|, so the cap does not bind.
    """
    tiny = torch.finfo(pull_norm.dtype).tiny
    return (rho * gradient_norm / pull_norm.clamp(min=tiny)).clamp(max=1.0)


def add_pull_gradient(parameter: nn.Parameter, pull: Pull, *, rho: float | None) -> None:
    """Adds a pull's gradient, strength * importance * (parameter - anchor), to `parameter.grad`.

    Args:
        parameter: Its gradient is that of the task by now, summed over ranks.
        pull: What to add; its tally is filled in.
        rho: Bound of the pull's norm as a multiple of the gradient's, block by block; None is off.
    """
    with torch.no_grad():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        values = (pull.anchor, pull.importance)
        parts = list(_chunks(parameter.detach(), parameter.grad, *values))
        squared = parameter.new_zeros((), dtype=_wide(parameter))
        energy = torch.zeros_like(squared)
        for theta, _, anchor, importance in parts:
            difference = theta.to(anchor.dtype) - anchor
            weighted = difference if importance is None else difference * importance
            squared += torch.dot(weighted, weighted)
            energy += torch.dot(weighted, difference)
        squared *= pull.strength**2
        factor = torch.ones_like(squared)
        if rho is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=squared.dtype)
            factor = layer_cap(norm, squared.sqrt(), rho)
        for theta, grad, anchor, importance in parts:
            difference = quadratic_gradient(theta.to(anchor.dtype), anchor, importance)
            grad.add_(difference.mul_(factor * pull.strength).to(grad.dtype))
        if pull.tally is not None:
            pull.tally.squared_norms.append(squared * factor**2)
            pull.tally.penalties.append(0.5 * pull.strength * energy)
            if rho is not None:
                pull.tally.capped.append((factor < 1).to(squared.dtype))


def add_lora_gradient(
    lora_A: nn.Parameter,
    lora_B: nn.Parameter,
    penalty: LoraPenalty,
    strength: float,
    tally: Tally,
    *,
    rho: float | None,
) -> None:
    """Adds the gradients of an adapter's penalty; the pair is one block for the cap `rho`."""
    with torch.no_grad():
        pairs = ((lora_A, penalty.grad_A_RI), (lora_B, penalty.grad_B_OR))
        squared = torch.stack([(extra * extra).sum() for _, extra in pairs]).sum() * strength**2
        factor = torch.ones_like(squared)
        if rho is not None:
            norms = [torch.linalg.vector_norm(p.grad) for p, _ in pairs if p.grad is not None] or [
                torch.zeros_like(squared)
            ]
            gradient_norm = torch.linalg.vector_norm(torch.stack(norms)).to(squared.dtype)
            factor = layer_cap(gradient_norm, squared.sqrt(), rho)
            tally.capped.append((factor < 1).to(squared.dtype))
        for parameter, extra in pairs:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_((extra * (factor * strength)).to(parameter.grad.dtype))
        tally.squared_norms.append(squared * factor**2)
        tally.penalties.append(strength * penalty.value)


def apply_pulls(
    params: Mapping[str, nn.Parameter],
    pulls: Sequence[Mapping[str, Pull]],
    learning_rates: Mapping[str, float],
) -> None:
    """13a: moves parameters, in place, to the minimum of all their pulls and the way back.

    theta <- (theta + lr * sum_k c_k F_k a_k) / (1 + lr * sum_k c_k F_k), which is stable for any
    strength. Each pull's share of the displacement is lr * c_k F_k (a_k - theta') at the new theta', so
    its norm is tallied exactly, also where several strategies pull.

    Args:
        params: Trainable parameters by canonical name.
        pulls: Those of every strategy, by canonical name.
        learning_rates: Of this step, by canonical name.
    """
    by_name: dict[str, list[Pull]] = {}
    for of_one in pulls:
        for name, pull in of_one.items():
            if pull.strength * learning_rates[name] > 0:
                by_name.setdefault(name, []).append(pull)
    with torch.no_grad():
        for name, own in by_name.items():
            _pull_parameter(params[name].detach(), own, learning_rates[name])


def divergence_sum(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    rescale: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of T^2 * D(teacher, student), each softened by T, in float32 or wider.

    `forward_kl` is KL(teacher || student), `reverse_kl` KL(student || teacher), and `jsd` is
    beta KL(p || M) + (1 - beta) KL(q || M) with M = beta p + (1 - beta) q. The gradient is computed in
    closed form beside the value, chunk by chunk, so nothing of size (N, V) is kept but the gradient.

    Args:
        student_NV: Logits of the model in training.
        teacher_NV: Logits to stay near to; no gradient flows into them.
        divergence: Which.
        temperature: Above 0. The square keeps gradients at one size over temperatures.
        beta: Weight of the teacher in `jsd`, strictly between 0 and 1.
        rescale: Divides `jsd` by beta (1 - beta), or beta acts as a hidden learning rate: it then tends to
            forward KL for beta -> 0 and to reverse KL for beta -> 1.

    Returns:
        The sum in nats, and the squared norm of its gradient with respect to the student's logits.

    Raises:
        ValueError: The shapes differ.
    """
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"teacher logits are {tuple(teacher_NV.shape)}, student's {tuple(student_NV.shape)}"
        )
    factor = 1.0 / (beta * (1.0 - beta)) if divergence == "jsd" and rescale else 1.0
    value, squared = _DivergenceSum.apply(  # type: ignore[no-untyped-call]
        student_NV, teacher_NV.detach(), divergence, temperature, beta, factor
    )
    return value, squared


class _DivergenceSum(torch.autograd.Function):
    """`divergence_sum` with its closed-form gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_NV: Tensor,
        teacher_NV: Tensor,
        divergence: Divergence,
        temperature: float,
        beta: float,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(student_NV.dtype, torch.float32)
        gradient_NV = torch.empty_like(student_NV)
        value = student_NV.new_zeros((), dtype=wide)
        squared = torch.zeros_like(value)
        rows = max(CHUNK_LOGITS // max(student_NV.shape[-1], 1), 1)
        parts = (x.split(rows) for x in (student_NV, teacher_NV, gradient_NV))
        for student, teacher, gradient in zip(*parts, strict=True):
            log_q = torch.log_softmax(student.to(wide) / temperature, -1)
            log_p = torch.log_softmax(teacher.to(wide) / temperature, -1)
            losses, slope = _divergence(log_p, log_q, divergence, beta)
            value += losses.sum() * (temperature**2 * factor)
            slope *= temperature * factor
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
        return gradient_NV * grad_value.to(gradient_NV.dtype), None, None, None, None, None


def _divergence(
    log_p: Tensor, log_q: Tensor, divergence: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergence of each token, and its gradient with respect to the logits behind `log_q`."""
    q = log_q.exp()
    if divergence == "forward_kl":
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q - p
    if divergence == "reverse_kl":
        ratio = log_q - log_p
        losses = (q * ratio).sum(-1)
        return losses, q * (ratio - losses[..., None])
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    ratio = log_q - log_m  # d D / d q_j = (1 - beta) log(q_j / M_j): all other terms cancel
    of_student = (q * ratio).sum(-1)
    losses = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1.0 - beta) * of_student
    return losses, (1.0 - beta) * q * (ratio - of_student[..., None])


def _pull_parameter(parameter: Tensor, pulls: Sequence[Pull], rate: float) -> None:
    operands = [value for pull in pulls for value in (pull.anchor, pull.importance)]
    sums = parameter.new_zeros((len(pulls), 2), dtype=_wide(parameter))
    for theta, *rest in _chunks(parameter, *operands):
        wide = theta.to(rest[0].dtype)
        if len(pulls) == 1:
            _pull_once(wide, rest[0], rest[1], pulls[0].strength * rate)
        else:
            _pull_jointly(wide, rest, [pull.strength * rate for pull in pulls])
        if wide is not theta:
            theta.copy_(wide)
        for k, pull in enumerate(pulls):
            if pull.tally is not None:
                _tally(sums[k], wide, rest[2 * k], rest[2 * k + 1])
    for pull, (squared, energy) in zip(pulls, sums, strict=True):
        if pull.tally is not None:
            pull.tally.squared_norms.append(squared * (pull.strength * rate) ** 2)
            pull.tally.penalties.append(energy * (0.5 * pull.strength))


def _pull_once(theta: Tensor, anchor: Tensor, importance: Tensor | None, weight: float) -> None:
    """theta <- anchor + (theta - anchor) / (1 + weight * importance)."""
    if importance is None:
        torch.lerp(anchor, theta, 1.0 / (1.0 + weight), out=theta)
    else:
        kept = torch.mul(importance, weight).add_(1.0).reciprocal_()
        torch.lerp(anchor, theta, kept, out=theta)


def _pull_jointly(theta: Tensor, operands: Sequence[Any], weights: Sequence[float]) -> None:
    total = torch.ones_like(theta)
    for k, weight in enumerate(weights):
        anchor, importance = operands[2 * k], operands[2 * k + 1]
        if importance is None:
            total += weight
            theta.add_(anchor, alpha=weight)
        else:
            share = importance * weight
            total += share
            theta.addcmul_(share, anchor)
    theta.div_(total)


def _tally(sums: Tensor, theta: Tensor, anchor: Tensor, importance: Tensor | None) -> None:
    """Adds sum (F d)^2 and sum F d^2 of a chunk while it is still in the cache."""
    difference = theta - anchor
    weighted = difference if importance is None else difference * importance
    sums[0] += torch.dot(weighted, weighted)
    sums[1] += torch.dot(weighted, difference)


def _chunks(parameter: Tensor, *operands: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Flat slices of tensors of one shape, side by side; None stays None. Slices are views."""
    size = CHUNK_ELEMENTS if parameter.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
    count = max(math.ceil(parameter.numel() / size), 1)
    flat = [
        (None,) * count if x is None else x.view(-1).split(size) for x in (parameter, *operands)
    ]
    yield from zip(*flat, strict=True)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
