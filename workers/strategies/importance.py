"""How much each weight matters: passes over rows that gather squared or absolute gradients."""

# Shape letters: N supervised positions, V vocabulary, I inputs and O outputs of a linear layer.

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from workers.strategies.batch import Micro
from workers.strategies.context import Context
from workers.strategies.modes import evaluating
from workers.strategies.penalties import wide_type

GROUP_ELEMENTS = 1 << 27  # frozen weights whose gradients a pass of an adapter's run holds at once
SORTED_ELEMENTS = 1 << 22  # a quantile is taken of at most so many evenly spaced values

Normalize = Literal["none", "mean", "max"]
GENERAL = "general"


@dataclass(frozen=True)
class Pass:
    """What a pass over rows gathers.

    Args:
        kind: Of the strategy, for messages.
        store: Whose rows are read; every rank reads its share.
        rows: Which.
        rows_per_gradient: Rows whose summed loss gives one gradient.
        loss: Sum over the positions of a part, of logits (N, V) in float32 or wider.
        gather: What is summed of each gradient, such as its square.
        only: Parameters, or adapted layers, that are measured; None: all of the task's.
    """

    kind: str
    store: str
    rows: Sequence[int]
    rows_per_gradient: int
    loss: Callable[[Tensor, Micro], Tensor]
    gather: Callable[[Tensor], Tensor]
    only: frozenset[str] | None = None


def task_store(ctx: Context) -> str:
    """The store of the task at hand's own rows."""
    return f"training-{ctx.task_index}" if ctx.task_index else "training"


def measure_importance(ctx: Context, what: Pass) -> dict[str, Tensor]:
    """Sums over the rows, per supervised token, at the weights as they are.

    Weights, gradients, modes and the global RNG are left as they were.

    Returns:
        `importance/<parameter>`; with adapters, for each adapted base weight, the means of its importance's
        rows, `rows/<layer>`, and of its columns relative to their mean, `columns/<layer>`: the importance
        is about their outer product. Float32 or wider.

    Raises:
        ValueError: No supervised token among the rows, or an importance that is zero or not finite.
    """
    found, num_tokens = (_sum_factors if ctx.lora_pairs else _sum_whole)(ctx, what)
    count = torch.tensor(float(num_tokens), dtype=torch.float64, device=ctx.device)
    for total in (*found.values(), count):
        ctx.all_reduce(total)
    if not count > 0:
        raise ValueError(f"{what.kind}: the {what.store} rows have no supervised token")
    for name, total in found.items():
        found[name] = relative(total) if name.startswith("columns/") else total.div_(float(count))
    mean = torch.stack([value.double().mean() for value in found.values()]).mean()
    if not (bool(torch.isfinite(mean)) and mean > 0):
        raise ValueError(f"{what.kind}: the importance measured is zero or not finite")
    return found


def normalize_importance(importance: Mapping[str, Tensor], mode: Normalize) -> dict[str, Tensor]:
    """Divides by the mean or the maximum over all weights together, so that strengths transfer."""
    if mode == "none":
        return dict(importance)
    totals, peaks, size = [], [], 0
    for name, value in importance.items():
        kind, _, layer = name.partition("/")
        if kind != "columns":
            columns = importance.get(f"columns/{layer}", value.new_ones(()))
            totals.append(value.double().sum() * columns.double().sum())
            peaks.append(value.max() * columns.max())
            size += value.numel() * columns.numel()
    scale = float(torch.stack(totals).sum() / size if mode == "mean" else torch.stack(peaks).max())
    if scale <= 0:
        return dict(importance)
    return {n: v if n.startswith("columns/") else v * (1.0 / scale) for n, v in importance.items()}


def clip_at_quantile(importance: Mapping[str, Tensor], quantile: float) -> dict[str, Tensor]:
    """Cuts values off at a quantile of all of them; factors each at their own quantile."""
    if quantile >= 1.0:
        return dict(importance)
    if all(name.startswith("importance/") for name in importance):
        limit = _quantile(list(importance.values()), quantile)
        return {name: value.clamp(max=limit) for name, value in importance.items()}
    return {n: value.clamp(max=_quantile([value], quantile)) for n, value in importance.items()}


def relative(values: Tensor) -> Tensor:
    """Values divided by their mean."""
    return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)


def _quantile(values: Sequence[Tensor], quantile: float) -> float:
    """The smallest value that so many are not above; infinite where that is 0."""
    stride = math.ceil(sum(value.numel() for value in values) / SORTED_ELEMENTS)
    flat = torch.cat([value.reshape(-1)[::stride] for value in values])
    rank = min(max(math.ceil(quantile * flat.numel()), 1), flat.numel())
    limit = float(flat.kthvalue(rank).values)
    return limit if limit > 0 else math.inf


def _sum_whole(ctx: Context, what: Pass) -> tuple[dict[str, Tensor], int]:
    """Sums of every weight's own, and this rank's supervised tokens."""
    params = {n: p for n, p in ctx.params.items() if what.only is None or n in what.only}
    sums = {
        f"importance/{name}": torch.zeros_like(p, dtype=wide_type(p), requires_grad=False)
        for name, p in params.items()
    }

    def add(name: str, grad: Tensor) -> None:
        total = sums[f"importance/{name}"]
        total.add_(what.gather(grad.to(total.dtype)))

    return sums, _run(ctx, what, params, add)


def _sum_factors(ctx: Context, what: Pass) -> tuple[dict[str, Tensor], int]:
    """Sums of the means of the base weights' rows and columns, a few layers' gradients at a time."""
    sums: dict[str, Tensor] = {}
    pairs = [p for p in ctx.lora_pairs if what.only is None or p.name in what.only]
    for pair in pairs:
        weight = pair.base_weight
        for kind, size in zip(("rows", "columns"), weight.shape, strict=True):
            sums[f"{kind}/{pair.name}"] = torch.zeros(
                size, dtype=wide_type(weight), device=ctx.device
            )

    def add(name: str, grad_OI: Tensor) -> None:
        rows_O, columns_I = sums[f"rows/{name}"], sums[f"columns/{name}"]
        gathered_OI = what.gather(grad_OI.to(rows_O.dtype))
        rows_O += gathered_OI.mean(1)
        columns_I += gathered_OI.mean(0)

    num_tokens = 0
    by_name = {pair.name: pair for pair in pairs}
    for group in _groups({pair.name: pair.base_weight for pair in pairs}):
        with contextlib.ExitStack() as stack:  # few whole weights of a quantised base at a time
            whole = {name: stack.enter_context(by_name[name].whole()) for name in group}
            num_tokens = _run(ctx, what, whole, add)
    return sums, num_tokens


def _run(
    ctx: Context,
    what: Pass,
    weights: Mapping[str, nn.Parameter],
    add: Callable[[str, Tensor], None],
) -> int:
    """Hands every gradient to `add`; returns this rank's supervised tokens."""
    if ctx.forward is None:
        raise ValueError(f"{what.kind}: the context gives no forward")
    names, tensors = list(weights), list(weights.values())
    num_tokens = 0
    with _prepared(ctx.model, tensors), torch.enable_grad():
        for part in _parts(ctx, what):
            logits_NV = ctx.forward(part).logits_NV
            loss = what.loss(logits_NV.to(wide_type(logits_NV)), part)
            # Not backward(): gradients of the parameters stay as they are.
            grads = torch.autograd.grad(loss, tensors, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    add(name, grad)
            num_tokens += part.positions_N.numel()
    return num_tokens


def _parts(ctx: Context, what: Pass) -> Iterator[Micro]:
    is_general = what.store == GENERAL
    rows = list(what.rows)
    for micro in ctx.general_micros(rows) if is_general else ctx.store_micros(what.store, rows):
        for part in micro.split(what.rows_per_gradient):
            if part.positions_N.numel():
                yield part


def _groups(weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, weight in weights.items():
        if group and size + weight.numel() > GROUP_ELEMENTS:
            yield group
            group, size = {}, 0
        group[name] = weight
        size += weight.numel()
    if group:
        yield group


@contextlib.contextmanager
def _prepared(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, and gradients for the weights, inside; all as it was afterwards."""
    before = [weight.requires_grad for weight in weights]
    with evaluating(model):
        try:
            for weight in weights:
                weight.requires_grad = True
            yield
        finally:
            for weight, flag in zip(weights, before, strict=True):
                weight.requires_grad = flag
