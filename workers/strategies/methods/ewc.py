"""Elastic weight consolidation (Kirkpatrick 2017): a quadratic anchor weighted by the Fisher information."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.strategies.base import Context, Cost, Micro, Needs, Pull, StateDict, Strategy
from workers.strategies.penalties import (
    factored_gradients,
    layerwise_scale,
    quadratic_gradient,
    wide,
)

MAX_PASSES = 128  # the estimator's error falls as 1 / sqrt(passes)
QUANTILE_SAMPLE = 1_000_000


class Ewc(Strategy):
    """strength / 2 * sum F_i (theta_i - theta0_i)^2, F the diagonal Fisher information of general text.

    The Fisher is per token. `true` samples the labels from the model and squares the gradient of the *summed*
    loss of a group of documents: unbiased whatever the group's size, since sampled scores are independent with
    mean zero (Gauss-Newton-Bartlett). `empirical` squares the gradient of every single document's data labels.

    With adapters the penalty is on the effective change dW = s B A with F ~ u v' from the row and column means
    of the Fisher of the adapted matrices: closed form, invariant to (B R, R^-1 A), m + n numbers a matrix.

    Args:
        penalty_mode: `implicit` is a decoupled step after the optimiser, stable for any strength; `gradient`
            adds the pull to the gradient. Adapters always use the gradient.
        fisher_type: `true` or `empirical`.
        fisher_samples: Documents of general data.
        fisher_normalize: `mean` or `max` scale that of all entries to 1.
        fisher_clip: Entries above this quantile are cut to it; 1 is off.
        gamma: Decay of the former importance at every later task (online EWC, Schwarz 2018).
        rho: Layer-wise cap in gradient mode; None is off.
    """

    kind = "ewc"

    def __init__(
        self,
        *,
        penalty_mode: Literal["implicit", "gradient"] = "implicit",
        fisher_type: Literal["true", "empirical"] = "true",
        fisher_samples: int = 1024,
        fisher_normalize: Literal["none", "mean", "max"] = "mean",
        fisher_clip: float = 0.999,
        gamma: float = 0.95,
        rho: float | None = 5.0,
    ) -> None:
        self._mode = penalty_mode
        self._fisher_type = fisher_type
        self._samples = fisher_samples
        self._normalize = fisher_normalize
        self._clip = fisher_clip
        self._gamma = gamma
        self._rho = rho
        # by parameter name; with adapters `<pair>.rows` and `<pair>.columns`
        self._importance: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._applied_sq: Tensor | None = None
        self._bound: list[Tensor] = []

    def needs(self) -> Needs:
        """General rows for the Fisher pass."""
        return Needs(general_rows=True)

    def cost(self) -> Cost:
        """The pass, then importance and anchor beside what is trained."""
        return Cost(step_share=0.02, trainable_copies=2.0)

    def on_task_start(self, ctx: Context) -> None:
        """Measures the importance at the present weights and anchors there.

        Raises:
            ValueError: There are no general rows.
        """
        if ctx.num_general_rows == 0:
            raise ValueError("ewc needs general rows, and none are left after the checks")
        settings = f"{self._fisher_type}/{self._samples}/{self._normalize}/{self._clip}"
        key = f"fisher/v{self.version}/{settings}/task{ctx.task_index}"
        # Only the first task starts at the base model; a later Fisher belongs to this run alone.
        fresh = (
            ctx.cached(key, lambda: self._measure(ctx))
            if ctx.task_index == 0
            else self._measure(ctx)
        )
        if self._importance:
            fresh = {n: self._gamma * self._importance[n] + f for n, f in fresh.items()}
        self._importance = fresh
        if not ctx.lora_pairs:
            self._anchor = {n: wide(p.detach()).clone() for n, p in ctx.params.items()}

    def on_step_start(self, ctx: Context) -> None:
        """Empties the meters."""
        self._applied_sq = None
        self._bound = []

    def add_grads(self, ctx: Context) -> None:
        """The pull's gradient, capped layer by layer."""
        strength = ctx.strength(self.kind)
        if strength == 0 or (self._mode == "implicit" and not ctx.lora_pairs):
            return
        self._applied_sq = torch.zeros((), device=ctx.device)
        for pair in ctx.lora_pairs:
            rows_O = self._importance[f"{pair.name}.rows"]
            columns_I = self._importance[f"{pair.name}.columns"]
            grads = factored_gradients(pair, rows_O, columns_I)
            self._add((pair.lora_A, pair.lora_B), [g.mul_(strength) for g in grads])
        if not ctx.lora_pairs:
            for name, parameter in ctx.params.items():
                pull = quadratic_gradient(
                    parameter.detach(), self._anchor[name], self._importance[name]
                )
                self._add((parameter,), [pull.mul_(strength)])

    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """The pull as an implicit step."""
        strength = ctx.strength(self.kind)
        if strength == 0 or self._mode == "gradient" or ctx.lora_pairs:
            return {}
        self._applied_sq = torch.zeros((), device=ctx.device)
        return {
            name: Pull(strength, self._importance[name], anchor, self._applied_sq)
            for name, anchor in self._anchor.items()
        }

    def metrics(self) -> Mapping[str, float]:
        """Norm of the displacement (implicit) or of the added gradient; share of layers at the cap."""
        values = {
            "applied_norm": 0.0 if self._applied_sq is None else float(self._applied_sq) ** 0.5
        }
        if self._bound:
            values["cap_share"] = float(torch.stack(self._bound).float().mean())
        return values

    def state_dict(self) -> StateDict:
        """Importance and anchor."""
        tensors = {f"importance/{name}": tensor for name, tensor in self._importance.items()}
        tensors |= {f"anchor/{name}": tensor for name, tensor in self._anchor.items()}
        return super().state_dict() | {"tensors": tensors}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up importance and anchor.

        Raises:
            ValueError: As the base class, or an anchor without its importance.
        """
        super().load_state_dict(state)
        parts: dict[str, dict[str, Tensor]] = {"importance": {}, "anchor": {}}
        for name, tensor in state["tensors"].items():
            part, _, rest = name.partition("/")
            parts[part][rest] = wide(tensor)
        lonely = parts["anchor"].keys() - parts["importance"].keys()
        if lonely:
            raise ValueError(f"state of ewc lacks the importance of {sorted(lonely)[0]}")
        self._importance, self._anchor = parts["importance"], parts["anchor"]

    def _add(self, parameters: Sequence[nn.Parameter], pulls: Sequence[Tensor]) -> None:
        """Adds the pull of one block, an adapter's two factors together, under one cap."""
        if self._rho is not None and all(p.grad is not None for p in parameters):
            task = torch.cat([p.grad.float().view(-1) for p in parameters if p.grad is not None])
            scale = layerwise_scale(
                task, torch.cat([pull.reshape(-1) for pull in pulls]), self._rho
            )
            self._bound.append(scale < 1)
            for pull in pulls:
                pull.mul_(scale)
        for parameter, pull in zip(parameters, pulls, strict=True):
            own = pull.to(parameter.dtype)
            parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)
            if self._applied_sq is not None:
                self._applied_sq += own.float().square().sum()

    def _measure(self, ctx: Context) -> dict[str, Tensor]:
        """The Fisher, clipped and normalised, by parameter name or as factors of the adapted matrices."""
        weights: dict[str, nn.Parameter] = (
            {pair.name: pair.base_weight for pair in ctx.lora_pairs}
            if ctx.lora_pairs
            else dict(ctx.params)
        )
        frozen = [w for w in weights.values() if not w.requires_grad]
        was_training = ctx.model.training
        ctx.model.eval()
        for weight in frozen:
            weight.requires_grad = True
        try:
            fisher = self._squares(ctx, weights)
        finally:
            ctx.model.train(was_training)
            for weight in frozen:
                weight.requires_grad = False
        scale = _scale(fisher, self._normalize, self._clip)
        fisher = {name: (f.clamp(max=scale.ceiling) / scale.unit) for name, f in fisher.items()}
        if not ctx.lora_pairs:
            return fisher
        factors = {}
        for name, matrix_OI in fisher.items():
            factors[f"{name}.rows"] = matrix_OI.mean(1)
            factors[f"{name}.columns"] = matrix_OI.mean(0) / matrix_OI.mean().clamp_min(1e-30)
        return factors

    def _squares(self, ctx: Context, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Sum of squared gradients over groups of documents, divided by the number of tokens."""
        generator = ctx.generator(self.kind)
        order = torch.randperm(ctx.num_general_rows, generator=generator).tolist()
        rows = order[: self._samples]
        size = 1 if self._fisher_type == "empirical" else -(-len(rows) // MAX_PASSES)
        sums = {n: torch.zeros_like(wide(w.detach())) for n, w in weights.items()}
        num_tokens = torch.zeros((), device=ctx.device, dtype=torch.float64)
        for start in range(0, len(rows), size):
            gradients = self._gradient_of_group(
                ctx, weights, rows[start : start + size], num_tokens
            )
            for name, gradient in gradients.items():
                sums[name].addcmul_(gradient, gradient)
        ctx.all_reduce(num_tokens)
        count = float(num_tokens)
        return {name: total.div_(max(count, 1.0)) for name, total in sums.items()}

    def _gradient_of_group(
        self,
        ctx: Context,
        weights: Mapping[str, nn.Parameter],
        rows: Sequence[int],
        num_tokens: Tensor,
    ) -> dict[str, Tensor]:
        """Gradient of the group's summed loss over all ranks, so that it doesn't depend on how rows are shared out."""
        if ctx.forward is None:
            raise ValueError("ewc needs a run to measure the Fisher in")
        gradients = {n: torch.zeros_like(wide(w.detach())) for n, w in weights.items()}
        for micro in ctx.general_micros(rows):
            logits_NV = wide(ctx.forward(micro).logits_NV)
            labels_N = self._labels(ctx, micro, logits_NV)
            loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    gradients[name] += gradient
            num_tokens += labels_N.numel()
        for gradient in gradients.values():
            ctx.all_reduce(gradient)
        return gradients

    def _labels(self, ctx: Context, micro: Micro, logits_NV: Tensor) -> Tensor:
        """Data labels, or labels sampled per document by its own generator: independent of the batching."""
        if self._fisher_type == "empirical":
            return micro.targets_N
        counts = torch.bincount(micro.row_of_N.cpu(), minlength=len(micro.sample_ids)).tolist()
        uniforms = []
        for sample_id, count in zip(micro.sample_ids, counts, strict=True):
            seed = ctx.generator(f"{self.kind}/{sample_id}")
            uniforms.append(torch.rand(count, generator=seed, dtype=torch.float64))
        cumulative_NV = torch.softmax(logits_NV.detach().double(), -1).cumsum(-1)
        drawn_N1 = torch.cat(uniforms).to(logits_NV.device)[:, None]
        labels_N: Tensor = torch.searchsorted(cumulative_NV, drawn_N1)[:, 0]
        return labels_N.clamp(max=logits_NV.shape[-1] - 1)


class _Scale:
    """Where entries are cut, and what is 1 afterwards."""

    def __init__(self, ceiling: float, unit: float) -> None:
        self.ceiling = ceiling
        self.unit = unit


def _scale(fisher: Mapping[str, Tensor], normalize: str, clip: float) -> _Scale:
    values = torch.cat([f.reshape(-1) for f in fisher.values()])
    ceiling = float(values.max())
    if clip < 1:
        # A quantile of an evenly spaced sample: exact ones are limited to 16 million entries.
        sample = values[:: max(1, values.numel() // QUANTILE_SAMPLE)]
        ceiling = float(torch.quantile(sample, clip))
    cut = values.clamp(max=ceiling) if ceiling > 0 else values
    match normalize:
        case "mean":
            unit = float(cut.mean())
        case "max":
            unit = float(cut.max())
        case _:
            unit = 1.0
    return _Scale(ceiling if ceiling > 0 else float("inf"), unit if unit > 0 else 1.0)
