"""The mathematics that strategies share, as functions of tensors."""

# Shape letters: N positions, V vocabulary, R rank of an adapter, I inputs and O outputs of a linear layer.

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from workers.strategies.pulls import Pull, Tally

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

CHUNK_ELEMENTS = 1 << 18  # on a CPU: temporaries stay in its cache, and few calls are made
CHUNK_ELEMENTS_DEVICE = 1 << 24
CHUNK_LOGITS = 1 << 20  # logits handled at once by a divergence: bounds its temporaries


class LoraPenalty(NamedTuple):
    """A quadratic penalty of an adapter's effective change, for strength 1, and its gradients."""

    value: Tensor
    grad_A_RI: Tensor
    grad_B_OR: Tensor


def wide_type(tensor: Tensor) -> torch.dtype:
    """At least float32: half precision loses tails of logits and small differences of weights."""
    return torch.promote_types(tensor.dtype, torch.float32)


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


def add_pull_gradients(
    params: Mapping[str, nn.Parameter], pulls: Mapping[str, Pull], *, rho: float | None
) -> None:
    """Adds the pulls' gradients, strength * importance * (parameter - anchor), to `grad`.

    Args:
        params: By canonical name. Their gradients are those of the task by now, summed over ranks.
        pulls: What to add, by canonical name; their tallies are filled in.
        rho: Bound of a pull's norm as a multiple of its parameter's gradient norm; None is off.
    """
    scratch = _Scratch()
    with torch.no_grad():
        for name, pull in pulls.items():
            _add_pull_gradient(params[name], pull, rho, scratch)


def _add_pull_gradient(
    parameter: nn.Parameter, pull: Pull, rho: float | None, scratch: "_Scratch"
) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    # The cap needs the norms of the whole block before anything is added.
    size = _chunk_size(parameter) if rho is None else parameter.numel()
    operands = (parameter.detach(), parameter.grad, pull.anchor, pull.importance)
    for theta, grad, anchor, importance in _chunks(size, *operands):
        weighted = torch.sub(theta, anchor, out=scratch.take(0, anchor))
        if importance is not None:
            weighted.mul_(importance)
        weight: float | Tensor = pull.strength
        if rho is not None:
            norm = torch.linalg.vector_norm(weighted) * pull.strength
            factor = layer_cap(torch.linalg.vector_norm(grad, dtype=norm.dtype), norm, rho)
            weight = factor * pull.strength
            if pull.tally is not None:
                pull.tally.capped.append((factor < 1).to(norm.dtype))
        if pull.tally is not None:
            energy = torch.dot(weighted, theta.to(anchor.dtype) - anchor)
            pull.tally.penalties.append(energy * (0.5 * pull.strength))
        grad.add_(weighted.mul_(weight))
        if pull.tally is not None:
            pull.tally.squared_norms.append(torch.dot(weighted, weighted))


def add_lora_gradient(
    lora_A: nn.Parameter,
    lora_B: nn.Parameter,
    penalty: LoraPenalty,
    strength: float,
    tally: Tally | None,
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
        for parameter, extra in pairs:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_((extra * (factor * strength)).to(parameter.grad.dtype))
        if tally is not None:
            tally.squared_norms.append(squared * factor**2)
            tally.penalties.append(strength * penalty.value)
            if rho is not None:
                tally.capped.append((factor < 1).to(squared.dtype))


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
    scratch = _Scratch()
    with torch.no_grad():
        for name, own in by_name.items():
            _pull_parameter(params[name].detach(), own, learning_rates[name], scratch)


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
        wide = wide_type(student_NV)
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


def _pull_parameter(
    parameter: Tensor, pulls: Sequence[Pull], rate: float, scratch: "_Scratch"
) -> None:
    operands = [value for pull in pulls for value in (pull.anchor, pull.importance)]
    weights = [pull.strength * rate for pull in pulls]
    for theta, *rest in _chunks(_chunk_size(parameter), parameter, *operands):
        wide = theta.to(rest[0].dtype)
        if len(pulls) == 1:
            _pull_once(wide, rest[0], rest[1], weights[0], scratch.take(0, wide))
        else:
            _pull_jointly(wide, rest, weights, scratch.take(0, wide), scratch.take(1, wide))
        if wide is not theta:
            theta.copy_(wide)
        for k, pull in enumerate(pulls):
            if pull.tally is not None:
                _tally(pull.tally, wide, (rest[2 * k], rest[2 * k + 1]), weights[k], rate, scratch)


def _pull_once(
    theta: Tensor, anchor: Tensor, importance: Tensor | None, weight: float, scratch: Tensor
) -> None:
    """theta <- anchor + (theta - anchor) / (1 + weight * importance)."""
    if importance is None:
        torch.lerp(anchor, theta, 1.0 / (1.0 + weight), out=theta)
    else:
        one = scratch.new_ones(())
        kept = torch.add(one, importance, alpha=weight, out=scratch).reciprocal_()
        torch.lerp(anchor, theta, kept, out=theta)


def _pull_jointly(
    theta: Tensor, operands: Sequence[Any], weights: Sequence[float], total: Tensor, share: Tensor
) -> None:
    total.fill_(1.0)
    for k, weight in enumerate(weights):
        anchor, importance = operands[2 * k], operands[2 * k + 1]
        if importance is None:
            total += weight
            theta.add_(anchor, alpha=weight)
        else:
            torch.mul(importance, weight, out=share)
            total += share
            theta.addcmul_(share, anchor)
    theta.div_(total)


def _tally(
    tally: Tally,
    theta: Tensor,
    operands: tuple[Tensor, Tensor | None],
    weight: float,
    rate: float,
    scratch: "_Scratch",
) -> None:
    """Adds what one pull did to a chunk that has been pulled; weight is strength times rate."""
    anchor, importance = operands
    difference = torch.sub(theta, anchor, out=scratch.take(0, theta))
    weighted = difference
    if importance is not None:
        weighted = torch.mul(difference, importance, out=scratch.take(1, theta))
    tally.squared_norms.append(torch.dot(weighted, weighted) * weight**2)
    tally.penalties.append(torch.dot(weighted, difference) * (0.5 * weight / rate))


class _Scratch:
    """Buffers kept over the parameters of a step: fresh memory would be paged in for each of them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: int, like: Tensor) -> Tensor:
        """A buffer like a flat tensor, with anything in it."""
        key = (slot, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[key] = torch.empty_like(like)
        return buffer if buffer.numel() == like.numel() else buffer[: like.numel()]


def _chunk_size(parameter: Tensor) -> int:
    return CHUNK_ELEMENTS if parameter.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE


def _chunks(size: int, *operands: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Flat slices of tensors of one shape, side by side; None stays None. Slices are views."""
    flat = [x if x is None else x.view(-1) for x in operands]
    numel = next(x.numel() for x in flat if x is not None)
    if numel <= size:
        yield tuple(flat)
        return
    count = math.ceil(numel / size)
    parts = [(None,) * count if x is None else x.split(size) for x in flat]
    yield from zip(*parts, strict=True)
