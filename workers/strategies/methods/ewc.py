"""Elastic weight consolidation: a quadratic anchor weighted by the Fisher information."""

# Shape letters: B rows, T tokens, N supervised positions, V vocabulary, I inputs and O outputs of a layer.

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.strategies.anchors import QuadraticAnchor
from workers.strategies.base import (
    Context,
    Cost,
    Micro,
    Needs,
)
from workers.strategies.penalties import (
    wide_type,
)

GROUP_ELEMENTS = 1 << 27  # frozen weights whose gradients a pass of an adapter's run holds at once
SORTED_ELEMENTS = 1 << 22  # a quantile is taken of at most so many evenly spaced values
CHUNK_LOGITS = 1 << 22
NUM_SQUARES = 128  # of a sampled-label pass: an entry's relative error is about sqrt(2 / 128)

FisherType = Literal["true", "empirical"]


class Ewc(QuadraticAnchor):
    """Penalty strength / 2 * sum of F (theta - anchor)^2 with F the diagonal Fisher per token.

    With adapters the penalty is on the effective change of each adapted weight, anchored at the frozen
    base weight, with F factored into the means of its rows and columns.

    The Fisher is measured on general rows when a task starts: for the first of the starting model (cached
    across jobs), for a later one of the weights as they are, added to the decayed former.

    Args:
        penalty_mode: `implicit` takes a decoupled step that is stable for any strength; `gradient` adds the
            penalty's gradient before clipping. Adapters always use the gradient.
        fisher_type: `true` samples labels from the model; `empirical` takes those of the data and squares
            document by document, which is exact and slower.
        fisher_samples: General rows that are read.
        fisher_normalize: `mean` and `max` scale F so that its mean or maximum over all weights is 1.
        fisher_clip: Quantile above which F is cut off, before it is normalised; 1 is off.
        gamma: Decay of the former tasks' Fisher.
        rho: In gradient mode the pull of a block is at most so many times its task gradient; None is off.
    """

    kind: ClassVar[str] = "ewc"

    def __init__(
        self,
        *,
        penalty_mode: Literal["implicit", "gradient"] = "implicit",
        fisher_type: FisherType = "true",
        fisher_samples: int = 1024,
        fisher_normalize: Literal["none", "mean", "max"] = "mean",
        fisher_clip: float = 0.999,
        gamma: float = 0.95,
        rho: float | None = 5.0,
    ) -> None:
        super().__init__(penalty_mode, rho)
        self.fisher_type: FisherType = fisher_type
        self.fisher_samples = fisher_samples
        self.fisher_normalize = fisher_normalize
        self.fisher_clip = fisher_clip
        self.gamma = gamma

    def needs(self) -> Needs:
        """General rows, and with adapters that the frozen base is what they are added to."""
        return Needs(general_rows=True, base_unmodified=True)

    def cost(self) -> Cost:
        """A pass over the parameters in each step, Fisher and anchor."""
        return Cost(step_share=0.02, trainable_copies=2.0)

    def expected_importance(self, ctx: Context) -> dict[str, torch.Size]:
        """The Fisher's diagonal, or its factors with adapters."""
        if not ctx.lora_pairs:
            return {f"importance/{name}": p.shape for name, p in ctx.params.items()}
        shapes = {}
        for pair in ctx.lora_pairs:
            outputs, inputs = pair.base_weight.shape
            shapes[f"rows/{pair.name}"] = torch.Size((outputs,))
            shapes[f"columns/{pair.name}"] = torch.Size((inputs,))
        return shapes

    def on_task_start(self, ctx: Context) -> None:
        """Measures the Fisher and takes the anchor."""
        if ctx.num_general_rows == 0:
            raise ValueError("ewc: there are no general rows to measure the Fisher on")
        generator = ctx.generator(self.kind)
        seed = generator.initial_seed()
        order = torch.randperm(ctx.num_general_rows, generator=generator)
        rows = sorted(order[: self.fisher_samples].tolist())

        def measure() -> dict[str, Tensor]:
            return measure_fisher(ctx, rows, self.fisher_type, seed)

        if self.importance:
            measured = measure()  # of weights that other jobs don't share
        else:
            measured = ctx.cached(f"ewc/fisher/2/{self.fisher_type}/{len(rows)}", measure)
        clipped = clip_at_quantile(measured, self.fisher_clip)
        self.consolidate(ctx, normalize_fisher(clipped, self.fisher_normalize))

    def consolidate(self, ctx: Context, fisher: Mapping[str, Tensor]) -> None:
        """F~ = gamma * F~ + F, and the weights as they are become the anchor (a copy)."""
        former, self.importance = self.importance, dict(fisher)
        for name in former:
            kind, _, layer = name.partition("/")
            if kind == "importance":
                self.importance[name] = self.gamma * former[name] + fisher[name]
            elif kind == "rows":
                rows, columns = name, f"columns/{layer}"
                # Row and column means of a sum are the sums of those of its addends.
                addends = ((self.gamma, former), (1.0, fisher))
                row_means = [w * f[rows] * f[columns].mean() for w, f in addends]
                column_means = [w * f[columns] * f[rows].mean() for w, f in addends]
                self.importance[rows] = row_means[0] + row_means[1]
                self.importance[columns] = _relative(column_means[0] + column_means[1])
        self.take_anchor(ctx)


def measure_fisher(
    ctx: Context, rows: Sequence[int], fisher_type: FisherType, seed: int
) -> dict[str, Tensor]:
    """The diagonal Fisher per token at the weights as they are, neither clipped nor normalised.

    `true`: labels are sampled from the model at every position, so scores are independent with mean zero,
    and the square of the gradient of a group of rows' *summed* loss is an unbiased sum of squares.
    `empirical`: the gradient of each document's own loss is squared. Weights, gradients, modes and the
    global RNG are left as they were. The rows are general ones, of which every rank reads its share; the
    seed fixes the sampled labels row by row, whatever the micro-batches.

    Returns:
        `importance/<parameter>`; with adapters, for each adapted base weight, the means of its Fisher's
        rows, `rows/<layer>`, and of its columns relative to their mean, `columns/<layer>`: F is about
        their outer product. Float32 or wider.

    Raises:
        ValueError: No supervised token among the rows, or a Fisher that is zero or not finite.
    """
    if ctx.lora_pairs:
        fisher, num_tokens = _measure_factors(ctx, rows, fisher_type, seed)
    else:
        fisher = {
            f"importance/{name}": torch.zeros_like(p, dtype=wide_type(p), requires_grad=False)
            for name, p in ctx.params.items()
        }

        def add_square(name: str, grad: Tensor) -> None:
            total = fisher[f"importance/{name}"]
            wide = grad.to(total.dtype)
            total.addcmul_(wide, wide)

        num_tokens = _sum_scores(ctx, ctx.params, rows, fisher_type, seed, add_square)
    count = torch.tensor(float(num_tokens), dtype=torch.float64, device=ctx.device)
    for total in (*fisher.values(), count):
        ctx.all_reduce(total)
    if not count > 0:
        raise ValueError("ewc: the general rows have no supervised token")
    for name, total in fisher.items():
        fisher[name] = _relative(total) if name.startswith("columns/") else total.div_(float(count))
    mean = torch.stack([value.double().mean() for value in fisher.values()]).mean()
    if not (bool(torch.isfinite(mean)) and mean > 0):
        raise ValueError("ewc: the Fisher information is zero or not finite")
    return fisher


def normalize_fisher(
    fisher: Mapping[str, Tensor], mode: Literal["none", "mean", "max"]
) -> dict[str, Tensor]:
    """Divides by the mean or the maximum over all weights together, so that strengths transfer."""
    if mode == "none":
        return dict(fisher)
    totals, peaks, size = [], [], 0
    for name, value in fisher.items():
        kind, _, layer = name.partition("/")
        if kind != "columns":
            columns = fisher.get(f"columns/{layer}", value.new_ones(()))
            totals.append(value.double().sum() * columns.double().sum())
            peaks.append(value.max() * columns.max())
            size += value.numel() * columns.numel()
    scale = float(torch.stack(totals).sum() / size if mode == "mean" else torch.stack(peaks).max())
    return {n: v if n.startswith("columns/") else v * (1.0 / scale) for n, v in fisher.items()}


def clip_at_quantile(fisher: Mapping[str, Tensor], quantile: float) -> dict[str, Tensor]:
    """Cuts values off at a quantile of all of them; factors each at their own quantile."""
    if quantile >= 1.0:
        return dict(fisher)
    if all(name.startswith("importance/") for name in fisher):
        limit = _quantile(list(fisher.values()), quantile)
        return {name: value.clamp(max=limit) for name, value in fisher.items()}
    return {n: value.clamp(max=_quantile([value], quantile)) for n, value in fisher.items()}


def _quantile(values: Sequence[Tensor], quantile: float) -> float:
    """The smallest value that so many are not above; infinite where that is 0."""
    stride = math.ceil(sum(value.numel() for value in values) / SORTED_ELEMENTS)
    flat = torch.cat([value.reshape(-1)[::stride] for value in values])
    rank = min(max(math.ceil(quantile * flat.numel()), 1), flat.numel())
    limit = float(flat.kthvalue(rank).values)
    return limit if limit > 0 else math.inf


def _measure_factors(
    ctx: Context, rows: Sequence[int], fisher_type: FisherType, seed: int
) -> tuple[dict[str, Tensor], int]:
    """Row and column means of the Fisher of the base weights, a few layers' gradients at a time."""
    fisher: dict[str, Tensor] = {}
    for pair in ctx.lora_pairs:
        weight = pair.base_weight.detach()
        fisher[f"rows/{pair.name}"] = weight.new_zeros(weight.shape[0], dtype=wide_type(weight))
        fisher[f"columns/{pair.name}"] = weight.new_zeros(weight.shape[1], dtype=wide_type(weight))

    def add_means(name: str, grad_OI: Tensor) -> None:
        rows_O, columns_I = fisher[f"rows/{name}"], fisher[f"columns/{name}"]
        squares_OI = grad_OI.to(rows_O.dtype).square()
        rows_O += squares_OI.mean(1)
        columns_I += squares_OI.mean(0)

    num_tokens = 0
    for group in _groups({pair.name: pair.base_weight for pair in ctx.lora_pairs}):
        num_tokens = _sum_scores(ctx, group, rows, fisher_type, seed, add_means)
    return fisher, num_tokens


def _sum_scores(
    ctx: Context,
    weights: Mapping[str, nn.Parameter],
    rows: Sequence[int],
    fisher_type: FisherType,
    seed: int,
    add: Callable[[str, Tensor], None],
) -> int:
    """Hands every score's gradient to `add`; returns this rank's supervised tokens."""
    if ctx.forward is None:
        raise ValueError("ewc: the context gives no forward")
    names, tensors = list(weights), list(weights.values())
    num_rows = 1 if fisher_type == "empirical" else math.ceil(len(rows) / NUM_SQUARES)
    num_tokens = 0
    with _prepared(ctx.model, tensors), torch.enable_grad():
        for micro in ctx.general_micros(rows):
            for part in micro.split(num_rows):
                if not part.positions_N.numel():
                    continue
                logits_NV = ctx.forward(part).logits_NV
                targets_N = part.targets_N
                if fisher_type == "true":
                    targets_N = sample_labels(logits_NV.detach(), part, seed)
                wide_NV = logits_NV.to(wide_type(logits_NV))
                loss = F.cross_entropy(wide_NV, targets_N, reduction="sum")
                # Not backward(): gradients of the parameters stay as they are.
                grads = torch.autograd.grad(loss, tensors, allow_unused=True)
                for name, grad in zip(names, grads, strict=True):
                    if grad is not None:
                        add(name, grad)
                num_tokens += part.positions_N.numel()
    return num_tokens


def sample_labels(logits_NV: Tensor, micro: Micro, seed: int) -> Tensor:
    """A label for each position, drawn from the model by inverting its distribution function.

    The draws of a row follow from (seed, sample id) alone, so they do not depend on how rows are grouped.
    """
    generator = torch.Generator()
    counts = torch.bincount(micro.row_of_N, minlength=len(micro.sample_ids)).tolist()
    draws = []
    for sample_id, count in zip(micro.sample_ids, counts, strict=True):
        generator.manual_seed((seed + 1_000_003 * (sample_id + 1)) % (2**63 - 25))
        draws.append(torch.rand(count, generator=generator, dtype=torch.float64))
    uniform_N = torch.cat(draws).to(logits_NV.device)
    chunk = max(CHUNK_LOGITS // logits_NV.shape[-1], 1)
    labels = []
    for logits, uniform in zip(logits_NV.split(chunk), uniform_N.split(chunk), strict=True):
        cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
        target = uniform[:, None] * cumulative[:, -1:]
        label = torch.searchsorted(cumulative, target, right=True)[:, 0]
        labels.append(label.clamp(max=logits.shape[-1] - 1))
    return torch.cat(labels)


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
    was_training = model.training
    before = [weight.requires_grad for weight in weights]
    model.eval()
    try:
        for weight in weights:
            weight.requires_grad = True
        yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad = flag
        model.train(was_training)


def _relative(values: Tensor) -> Tensor:
    return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
