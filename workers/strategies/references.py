"""The direction that updates are held to: recorded in this run, left by earlier jobs, or against a gradient."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.context import Context, LoraPair
from workers.strategies.directions import (
    Direction,
    base_name,
    fit,
    pair_name,
    read_difference,
    read_trajectory,
)
from workers.strategies.modes import evaluating

Source = Literal["ema", "trajectory", "difference", "general"]


def general_gradient(ctx: Context, rows: Sequence[int]) -> dict[str, Tensor]:
    """The gradient of the mean nats per supervised token on general rows, over all ranks.

    Gradients in `grad`, modes and the global RNG are left as they were.

    Returns:
        By canonical name, in float32 or wider.

    Raises:
        ValueError: The rows have no supervised token.
    """
    if ctx.forward is None:
        raise ValueError("progressive: the context gives no forward")
    names, weights = list(ctx.params), list(ctx.params.values())
    sums = [torch.zeros_like(w, dtype=_wide(w), requires_grad=False) for w in weights]
    count = torch.zeros((), dtype=torch.float64, device=ctx.device)
    with evaluating(ctx.model), torch.enable_grad():
        for micro in ctx.general_micros(rows):
            if not micro.positions_N.numel():
                continue
            logits_NV = ctx.forward(micro).logits_NV
            loss = F.cross_entropy(logits_NV.to(_wide(logits_NV)), micro.targets_N, reduction="sum")
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total.add_(grad)
            count += micro.positions_N.numel()
    for total in (*sums, count):
        ctx.all_reduce(total)
    if not count > 0:
        raise ValueError("progressive: the general rows have no supervised token")
    return {name: total / float(count) for name, total in zip(names, sums, strict=True)}


class Reference:
    """A direction of displacement for each trained weight, as far as there is one.

    Args:
        source: `ema`: the running mean of this task's first displacements, from the second task on that of
            the task before. `trajectory`, `difference`: files of other models. `general`: minus the
            gradient on general rows.
        models: Names of the models that the files belong to.
        beta: Of the running mean.
        warmup: Steps that are recorded before the running mean is held to.
        refresh: Steps between two gradients.
        num_rows: General rows of a gradient.
    """

    def __init__(
        self,
        source: Source,
        models: Sequence[str],
        *,
        beta: float,
        warmup: int,
        refresh: int,
        num_rows: int,
    ) -> None:
        self.source: Source = source
        self.models = tuple(models)
        self.beta = beta
        self.warmup = warmup
        self.refresh_steps = refresh
        self.num_rows = num_rows
        self.recorded: dict[str, Tensor] = {}  # of this task
        self.held: dict[str, Tensor] = {}  # what updates are held to, by parameter
        self.num_recorded = 0
        self.refreshed_at = -1  # step; -1: never
        self._files: dict[str, Direction] | None = None  # by name in the base model

    def start_task(self, ctx: Context) -> None:
        """What the task before left is held to from now on, where it is of weights that this task trains.

        Raises:
            ValueError: Files do not fit the model, or there are no general rows.
        """
        if self.source == "general" and not ctx.num_general_rows:
            raise ValueError("progressive: there are no general rows for a reference gradient")
        self.held = {name: r for name, r in self.held.items() if name in ctx.params}
        self.recorded, self.num_recorded, self.refreshed_at = {}, 0, -1
        self._files = self._read(ctx)

    def end_task(self) -> None:
        """What was recorded is held to in the next task."""
        if self.source == "ema" and self.recorded:
            self.held = self.recorded
            self.recorded, self.num_recorded = {}, 0

    def start_step(self, ctx: Context) -> None:
        """A new gradient where one is due."""
        if self.source != "general":
            return
        age = ctx.step - self.refreshed_at
        if self.held and 0 <= age < self.refresh_steps and self.refreshed_at >= 0:
            return
        generator = ctx.generator(f"progressive/{ctx.step}")
        order = torch.randperm(ctx.num_general_rows, generator=generator)
        rows = sorted(order[: self.num_rows].tolist())
        self.held = {name: -grad for name, grad in general_gradient(ctx, rows).items()}
        self.refreshed_at = ctx.step

    def record(self, delta: Mapping[str, Tensor]) -> None:
        """Takes a displacement into the running mean; after the warm-up the mean of then is held to."""
        if self.source != "ema":
            return
        for name, step in delta.items():
            former = self.recorded.get(name)
            wide = (1.0 - self.beta) * step.to(_wide(step))
            self.recorded[name] = wide if former is None else wide.add_(former, alpha=self.beta)
        self.num_recorded += 1
        if not self.held and self.num_recorded >= self.warmup:
            self.held = {name: mean.clone() for name, mean in self.recorded.items()}

    def of_parameters(self, ctx: Context, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reference of each trained weight that has one, at the weights from before the step.

        A direction of an adapter's effective weight is seen from its factors; see `Direction.pulled_back`.
        """
        if self.source in ("ema", "general"):
            return {name: r for name, r in self.held.items() if name in old}
        if self._files is None:  # a resumed run
            self._files = self._read(ctx) or {}
        found: dict[str, Tensor] = {}
        for name_A, name_B, pair in factor_names(ctx):
            direction = self._files.get(pair_name(pair))
            if direction is not None:
                dtype = _wide(old[name_A])
                factors = (old[name_A].to(dtype), old[name_B].to(dtype))
                pulled = direction.pulled_back(*factors, pair.scale)
                found[name_A], found[name_B] = pulled
        for name in old:
            direction = self._files.get(base_name(name))
            if name not in found and direction is not None:
                found[name] = direction.whole()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs; files are read again."""
        held = {f"held/{name}": value for name, value in self.held.items()}
        return held | {f"recorded/{name}": value for name, value in self.recorded.items()}

    def scalars(self) -> dict[str, int]:
        """The counts of a resumed run."""
        return {"num_recorded": self.num_recorded, "refreshed_at": self.refreshed_at}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> None:
        """Takes up what was saved."""
        self.held = {
            k.removeprefix("held/"): t for k, t in tensors.items() if k.startswith("held/")
        }
        self.recorded = {
            k.removeprefix("recorded/"): t.clone()
            for k, t in tensors.items()
            if k.startswith("recorded/")
        }
        self.num_recorded, self.refreshed_at = scalars["num_recorded"], scalars["refreshed_at"]

    def _read(self, ctx: Context) -> dict[str, Direction] | None:
        if self.source not in ("trajectory", "difference"):
            return None
        missing = [name for name in self.models if name not in ctx.models]
        if missing:
            raise ValueError(f"progressive: the model {missing[0]} has not been fetched")
        directories = [Path(ctx.models[name]) for name in self.models]
        try:
            if self.source == "trajectory":
                return fit(ctx, read_trajectory(directories[0]))
            return fit(ctx, read_difference(directories[0], directories[1]))
        except ValueError as error:
            raise ValueError(f"progressive: {error}") from error


def factor_names(ctx: Context) -> list[tuple[str, str, LoraPair]]:
    """The adapters whose two factors are trained, with the factors' names."""
    names = {id(p): name for name, p in ctx.params.items()}
    found = []
    for pair in ctx.lora_pairs:
        name_A, name_B = names.get(id(pair.lora_A)), names.get(id(pair.lora_B))
        if name_A is not None and name_B is not None:
            found.append((name_A, name_B, pair))
    return found


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
