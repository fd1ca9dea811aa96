"""Domain adapters: one adapter a task on a frozen base, kept off what earlier ones read, merged or routed."""

# Shape letters: R rank of an adapter, I inputs of a layer, Q directions that earlier adapters read, D width.

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.strategies.base import Cost, Needs, StateDict, Strategy
from workers.strategies.context import Adapters, Context

LEAST_SHARE, MOST_SHARE = 0.003, 0.01  # of the base's parameters, without a note
PLACED_ROWS = 512  # rows behind a centroid, and general rows behind the threshold
FALSE_ACCEPT = 0.05  # share of general rows that may be given to an adapter
RANK_TOLERANCE = 1e-6  # of the largest singular value


class Overlap(NamedTuple):
    """How much of one adapter's reading earlier ones share, and its gradient."""

    value: Tensor
    grad_RI: Tensor


class DomainAdapters(Strategy):
    """Trains one adapter a task; the others stay as they are, bit for bit.

    The strength is that of O-LoRA (Wang 2023), normalised: with A the rows by which an adapter reads a
    layer's input, strength * sum over layers and earlier adapters j of |A_j A'|^2 / (|A_j|^2 |A|^2), each
    addend in [0, 1]. `hard` takes the part in the span of the earlier rows out of A, at the task's start, of
    its gradient and after each step; a strength below 1 takes that share of it. At 0 adapters are still one
    a task, but free.

    Args:
        kind: `lora` or `bottleneck`; decided when the model is built, as are `budget`, `r` and
            `allow_any_share`.
        budget: Share of the base's parameters.
        r: Rank or width in its place.
        allow_any_share: Whether a share out of bounds was asked for: then it is no finding.
        compose: Whether earlier adapters act beside the task's own (`stacked`).
        orthogonality: `penalty` or `hard`.
        merge: How finished adapters become one when they are published; stacked ones are summed (`cat`).
        merge_weights: One a task; None: 1 each.
        merge_rank: Of the merged adapter; None: the method's own.
        density: Share of entries that `ties` and `dare` keep.
        route: Whether centroids and a threshold are made and published.
    """

    kind: ClassVar[str] = "domain_adapters"

    def __init__(  # noqa: PLR0913 - the fields of its configuration
        self,
        *,
        kind: Literal["lora", "bottleneck"] = "lora",
        budget: float = 0.005,
        r: int | None = None,
        allow_any_share: bool = False,
        compose: Literal["separate", "stacked"] = "separate",
        orthogonality: Literal["penalty", "hard"] = "penalty",
        merge: Literal["none", "cat", "svd", "ties", "dare"] = "none",
        merge_weights: Sequence[float] | None = None,
        merge_rank: int | None = None,
        density: float = 0.5,
        route: bool = True,
    ) -> None:
        self.adapter_kind = kind
        self.budget = budget
        self.rank = r
        self.allow_any_share = allow_any_share
        self.compose = compose
        self.orthogonality = orthogonality
        self.merge = merge
        self.merge_weights = merge_weights
        self.merge_rank = merge_rank
        self.density = density
        self.route = route
        self.centroids: dict[str, Tensor] = {}  # of unit norm, by adapter
        #: `threshold`, `false_accept` on general rows that did not fit it, and `rows` behind each centroid.
        self.routing: dict[str, Any] = {}
        self._names: tuple[str, ...] | None = None
        self._bases: dict[str, Tensor] | None = None  # by layer: (I, Q), orthonormal
        self._applied = 0.0
        self._overlap = 0.0

    def needs(self) -> Needs:
        """Hard orthogonality edits the displacement; routing reads with the base."""
        return Needs(snapshot=self.orthogonality == "hard", base_unmodified=self.route)

    def cost(self) -> Cost:
        """Products of rank-sized matrices in each step; a pass over some rows at a task's end."""
        return Cost(step_share=0.02)

    def edit_trainable(self, ctx: Context, names: frozenset[str]) -> frozenset[str]:
        """The task's own adapter alone is trained; it is active, with the earlier ones where they are stacked."""
        self._bases = None
        if ctx.adapters is None:
            return names
        self._names = ctx.adapters.names
        own = ctx.adapters.names[ctx.task_index]
        ctx.adapters.activate(self._active(ctx.adapters, ctx.task_index))
        return names & ctx.adapters.params[own]

    def on_task_start(self, ctx: Context) -> None:
        """Says where an adapter's size is unusual; makes a hard adapter's rows orthogonal to earlier ones.

        Raises:
            ValueError: The run has no adapters, or earlier ones read all that there is to read.
        """
        adapters = _adapters(ctx)
        outside = not LEAST_SHARE <= adapters.share <= MOST_SHARE
        if ctx.task_index == 0 and outside and not self.allow_any_share:
            text = f"An adapter has {100 * adapters.share:.2g} % of the base's parameters, not 0.3 to 1 %."
            ctx.note("adapter_share", text, {"share": adapters.share})
        if self.orthogonality == "hard" and ctx.strength(self.kind) > 0:
            self._check_room(ctx)
            with torch.no_grad():
                for layer, own in self._own(ctx).items():
                    own.sub_(self._shared(ctx, layer, own))

    def add_grads(self, ctx: Context) -> None:
        """The penalty's gradient."""
        self._applied, self._overlap = 0.0, 0.0
        strength = ctx.strength(self.kind)
        if strength <= 0 or not self._earlier(ctx):
            return
        squared, values = [], []
        with torch.no_grad():
            for layer, own in self._own(ctx).items():
                found = overlap(own.detach(), self._rows(ctx, layer))
                values.append(found.value)
                if self.orthogonality == "penalty":
                    _add(own, found.grad_RI * strength)
                    squared.append(found.grad_RI.square().sum() * strength**2)
        if values:
            self._overlap = float(torch.stack(values).mean())
        if squared:
            self._applied = float(torch.stack(squared).sum().sqrt())

    def edit_grads(self, ctx: Context) -> None:
        """Hard: takes the earlier adapters' directions out of the gradient."""
        if self.orthogonality != "hard" or ctx.strength(self.kind) <= 0 or not self._earlier(ctx):
            return
        squared = []
        with torch.no_grad():
            for layer, own in self._own(ctx).items():
                if own.grad is not None:
                    shared = self._shared(ctx, layer, own.grad)
                    own.grad.sub_(shared)
                    squared.append(shared.square().sum())
        if squared:
            self._applied = float(torch.stack(squared).sum().sqrt())

    def edit_update(
        self, ctx: Context, old: Mapping[str, Tensor], delta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Hard: takes them out of where the step leads, so that momentum and decay can't bring them back."""
        if ctx.strength(self.kind) <= 0 or not self._earlier(ctx):
            return delta
        names = {id(parameter): name for name, parameter in ctx.params.items()}
        edited = dict(delta)
        for layer, own in self._own(ctx).items():
            name = names[id(own)]
            edited[name] = delta[name] - self._shared(ctx, layer, old[name] + delta[name])
        return edited

    def on_task_end(self, ctx: Context) -> None:
        """Keeps the centroid of the task's rows, and fits the threshold to the centroids so far."""
        # by prompts alone, which is all that is known of a row to route; `embed` reads the answers, too
        represent = ctx.represent or ctx.embed
        if not self.route or represent is None:
            return
        store = f"training-{ctx.task_index}" if ctx.task_index else "training"
        rows = _spread(ctx.num_training_rows)
        mean = represent(store, rows).float().mean(0)
        name = _adapters(ctx).names[ctx.task_index]
        self.centroids[name] = mean / mean.norm().clamp(min=1e-12)
        counted = {**self.routing.get("rows", {}), name: len(rows)}
        self.routing = {
            "representation": "base" if ctx.represent else "encoder",
            "rows": counted,
            "threshold": -1.0,  # never the base: there is nothing to tell it by
            "false_accept": None,
        }
        general = _spread(ctx.num_general_rows)
        if len(general) >= 2:
            centroids = torch.stack(list(self.centroids.values()))
            nearest = (represent("general", general).float() @ centroids.T).amax(1)
            threshold = fit_threshold(nearest[::2])
            self.routing["threshold"] = threshold
            self.routing["false_accept"] = float((nearest[1::2] >= threshold).float().mean())

    def on_publish(self, ctx: Context) -> None:
        """Merges the finished adapters, so that what is measured is what is published."""
        adapters = _adapters(ctx)
        finished = adapters.names[: ctx.task_index + 1]
        active = self._active(adapters, ctx.task_index)
        adapters.activate(active)
        method = "cat" if self.merge == "none" and len(active) > 1 else self.merge
        if method == "none" or len(finished) < 2 or self.adapter_kind == "bottleneck":
            return
        weights = self.merge_weights or [1.0] * len(adapters.names)
        told = adapters.merge(
            finished,
            method,
            weights=weights[: len(finished)],
            density=self.density,
            rank=self.merge_rank,
            seed=int(ctx.generator(self.kind).initial_seed() % 2**62),
        )
        text = (
            f"{len(finished)} adapters are merged ({method}) into one of rank {told['rank']:.0f};"
            f" {100 * told['relative_error']:.2g} % of the change is lost to the rank."
        )
        ctx.note("adapters_merged", text, dict(told))

    def export_files(self, ctx: Context, directory: Path) -> None:
        """`routing.json` and the centroids, where adapters can be chosen among."""
        if not self.centroids:
            return
        record = {"format": 1, "names": list(self.centroids), **self.routing}
        (directory / "routing.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        tensors = {name: c.detach().cpu().contiguous() for name, c in self.centroids.items()}
        save_file(tensors, directory / "routing.safetensors")

    def metrics(self) -> Mapping[str, float]:
        """`applied_norm` of the penalty's gradient (hard: of what was taken out of the gradient), and
        `overlap`, the mean over layers of the penalty's addends.
        """
        return {"applied_norm": self._applied, "overlap": self._overlap}

    def state_dict(self) -> StateDict:
        """Centroids and threshold; the adapters are the run's own, and what earlier ones read follows from them."""
        tensors = {f"centroid/{name}": c for name, c in self.centroids.items()}
        return {**super().state_dict(), "tensors": tensors, "scalars": {"routing": self.routing}}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up centroids and threshold.

        Raises:
            ValueError: They are of adapters that the run doesn't have.
        """
        super().load_state_dict(state)
        centroids = {n.removeprefix("centroid/"): t.clone() for n, t in state["tensors"].items()}
        routing = dict(state["scalars"]["routing"])
        unknown = set(centroids) - set(self._names or centroids)
        if unknown or set(routing.get("rows", {})) != set(centroids):
            raise ValueError(
                "state of domain_adapters: its centroids are not of this run's adapters"
            )
        # a file's tensors come in the order of their names, but ties go to the first centroid
        self.centroids = {
            name: centroids[name] for name in self._names or centroids if name in centroids
        }
        self.routing = routing
        self._bases = None

    def _active(self, adapters: Adapters, index: int) -> tuple[str, ...]:
        return (
            adapters.names[: index + 1] if self.compose == "stacked" else (adapters.names[index],)
        )

    def _own(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The readers that the task trains, by layer."""
        adapters = _adapters(ctx)
        readers = adapters.readers[adapters.names[ctx.task_index]]
        return {layer: p for layer, p in readers.items() if p.requires_grad}

    def _earlier(self, ctx: Context) -> tuple[str, ...]:
        return _adapters(ctx).names[: ctx.task_index]

    def _rows(self, ctx: Context, layer: str) -> list[Tensor]:
        readers = _adapters(ctx).readers
        return [readers[name][layer].detach() for name in self._earlier(ctx)]

    def _shared(self, ctx: Context, layer: str, rows_RI: Tensor) -> Tensor:
        """The part of rows in the span of the earlier ones, as far as the strength takes it out."""
        if not self._earlier(ctx):
            return torch.zeros_like(rows_RI)
        if self._bases is None:
            self._bases = {name: row_space(self._rows(ctx, name)) for name in self._own(ctx)}
        basis_IQ = self._bases[layer].to(rows_RI.dtype)
        return (rows_RI @ basis_IQ) @ basis_IQ.T * min(ctx.strength(self.kind), 1.0)

    def _check_room(self, ctx: Context) -> None:
        for layer, own in self._own(ctx).items() if self._earlier(ctx) else ():
            read = row_space(self._rows(ctx, layer)).shape[1]
            if read >= own.shape[1]:
                raise ValueError(
                    f"domain_adapters: earlier adapters read all {own.shape[1]} inputs of {layer}, so nothing is"
                    " left for a hard one; lower its rank, or use the penalty"
                )


def overlap(rows_RI: Tensor, earlier: Sequence[Tensor]) -> Overlap:
    """sum_j |A_j A'|^2 / (|A_j|^2 |A|^2), Frobenius norms, and its gradient with respect to A.

    With M = sum_j A_j' A_j / |A_j|^2 it is f = tr(A M A') / |A|^2, so the gradient is 2 (A M - f A) / |A|^2.
    Neither M nor anything else of size (I, I) is made.
    """
    squared = rows_RI.square().sum().clamp(min=torch.finfo(rows_RI.dtype).tiny)
    product_RI = torch.zeros_like(rows_RI)
    for other in earlier:
        of_other = other.square().sum().clamp(min=torch.finfo(other.dtype).tiny)
        product_RI += (rows_RI @ other.T) @ other / of_other
    value = (product_RI * rows_RI).sum() / squared
    return Overlap(value, 2.0 * (product_RI - value * rows_RI) / squared)


def row_space(matrices: Sequence[Tensor]) -> Tensor:
    """Orthonormal columns (I, Q) that span the rows of all matrices (R, I), in float64."""
    stacked = torch.cat([m.double() for m in matrices])
    _, values, rows = torch.linalg.svd(stacked, full_matrices=False)
    basis_IQ: Tensor = rows[values > RANK_TOLERANCE * values.max()].T.contiguous()
    return basis_IQ


def fit_threshold(similarities: Tensor) -> float:
    """The least threshold that at most 5 % of these reach."""
    ordered = similarities.float().sort(descending=True).values
    allowed = int(FALSE_ACCEPT * len(ordered))
    above = torch.nextafter(ordered[allowed], torch.tensor(torch.inf, device=ordered.device))
    return float(above)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient)


def _adapters(ctx: Context) -> Adapters:
    if ctx.adapters is None:
        raise ValueError("domain_adapters: the run has no adapters; it needs training.type 'lora'")
    return ctx.adapters


def _spread(count: int) -> list[int]:
    """At most 512 of so many rows, evenly over the file."""
    taken = min(count, PLACED_ROWS)
    return [k * count // taken for k in range(taken)]
