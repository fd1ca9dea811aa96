"""Progressive tuning: updates keep to a direction, rows come easiest first, general rows fade out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.base import Cost, Needs, StateDict, Strategy
from workers.strategies.batch import Micro, Stream
from workers.strategies.cones import half_space, hold_blocks
from workers.strategies.context import Context
from workers.strategies.curriculum import (
    DOMAIN,
    GENERAL,
    Curriculum,
    Difficulty,
    check_difficulties,
)
from workers.strategies.directions import displacement, write_trajectory
from workers.strategies.references import Reference, Source, factor_names
from workers.strategies.subspaces import InputBases, leave_out

Mode = Literal["cone", "a_gem", "gpm", "none"]


class Progressive(Strategy):
    """Constrains where updates point, and paces the rows they come from.

    `cone` constrains the real displacement of a step, behind the optimiser and its decay; `a_gem` the
    gradient; `gpm` both. The strength is the cone's least cosine, for `a_gem` and `gpm` the share of what
    conflicts that is removed, and for `none` the factor on the general rows' share.

    Args:
        mode: The constraint.
        scope: Of a cone: every weight matrix (an adapter's two factors together), or all weights as one.
        reference: Where a cone's direction comes from; `auto` is `ema`, for `a_gem` `general`.
        reference_models: Models that the direction is read from.
        ref_beta: Of the running mean of displacements.
        ref_refresh: Steps between two gradients on general rows.
        ref_rows: General rows of such a gradient.
        warmup_ref_steps: Steps that are recorded before a running mean is held to.
        gpm_threshold: Share of the old inputs' energy that is closed to updates.
        gpm_rows: Rows behind each extension of the bases.
        record_trajectory: Whether the run's displacement is published beside its weights.
        curriculum: What rows are ranked by.
        c0: Share of the rows drawn at first.
        p: Power of the competence.
        curriculum_steps: Share of a task's steps after which all rows are drawn.
        mix_start: General rows' share of a step's rows at first; None mixes none in.
        mix_end: Their share at the end.
    """

    kind: ClassVar[str] = "progressive"
    update_rank: ClassVar[int] = 1

    def __init__(  # noqa: PLR0913 - the fields of its configuration
        self,
        *,
        mode: Mode = "a_gem",
        scope: Literal["block", "global"] = "block",
        reference: Source | Literal["auto"] = "auto",
        reference_models: Sequence[str] = (),
        ref_beta: float = 0.99,
        ref_refresh: int = 50,
        ref_rows: int = 64,
        warmup_ref_steps: int = 100,
        gpm_threshold: float = 0.97,
        gpm_rows: int = 256,
        record_trajectory: bool = False,
        curriculum: Difficulty = "nll",
        c0: float = 0.1,
        p: float = 2.0,
        curriculum_steps: float = 0.4,
        mix_start: float | None = 0.5,
        mix_end: float = 0.05,
    ) -> None:
        self.mode: Mode = mode
        self.scope = scope
        own: Source = "general" if mode == "a_gem" else "ema"
        self.reference = Reference(
            own if reference == "auto" else reference,
            reference_models,
            beta=ref_beta,
            warmup=warmup_ref_steps,
            refresh=ref_refresh,
            num_rows=ref_rows,
        )
        self.bases = InputBases(gpm_threshold)
        self.gpm_rows = gpm_rows
        self.record_trajectory = record_trajectory
        self.curriculum = Curriculum(
            difficulty=curriculum,
            start=c0,
            power=p,
            steps=curriculum_steps,
            mix_start=mix_start,
            mix_end=mix_end,
        )
        self._start: dict[str, Tensor] = {}  # weights at the run's start, for its trajectory
        self._domain: Stream | None = None  # the task's, unrestricted
        self._shapes: dict[str, torch.Size] = {}
        self._sizes: Mapping[str, int] = {}
        self._numbers: dict[str, float] = {}

    @property
    def constrains(self) -> bool:
        """Whether it acts on the displacement."""
        return self.mode in ("cone", "gpm")

    @property
    def reads_gradients(self) -> bool:
        """Whether a gradient on general rows is its reference."""
        return self.mode in ("cone", "a_gem") and self.reference.source == "general"

    def needs(self) -> Needs:
        """The weights from before a step, and general rows."""
        general = self.reads_gradients or self.mode == "gpm"
        mixes = self.curriculum.mix_start is not None
        return Needs(snapshot=self.constrains, general_rows=general or mixes)

    def cost(self) -> Cost:
        """A gradient every `ref_refresh` steps, the rows mixed in, and copies of the trained weights."""
        refresh = 1.0 / self.reference.refresh_steps if self.reads_gradients else 0.0
        mixed = 0.0
        if self.curriculum.mix_start is not None:
            first, last = self.curriculum.mix_start, self.curriculum.mix_end
            paced = self.curriculum.steps
            share = paced * (first + last) / 2 + (1 - paced) * last
            mixed = share / (1 - share)
        copies = {"cone": 3.0, "a_gem": 1.0, "gpm": 1.0, "none": 0.0}[self.mode]
        return Cost(
            step_share=refresh + mixed, trainable_copies=copies + float(self.record_trajectory)
        )

    # 2-5: streams and the passes of a task

    def edit_param_groups(self, ctx: Context, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Takes note of what saved tensors must fit."""
        self._shapes = {name: p.shape for name, p in ctx.model.named_parameters()}
        self._sizes = ctx.store_sizes
        return groups

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """The easiest domain rows alone at first, and general rows that fade out."""
        self._domain = next(s for s in streams if s.name == DOMAIN)
        return self.curriculum.edit(ctx, streams, self._pace(ctx))

    def streams_changed(self, ctx: Context) -> bool:
        """Whether the pace has moved on."""
        if self._domain is None:
            return False
        return self.curriculum.is_due(ctx, len(self._domain.rows), self._pace(ctx))

    def on_task_start(self, ctx: Context) -> None:
        """Ranks rows, reads references, and learns the inputs that general rows give."""
        self._numbers = {}
        self.curriculum.measure(ctx)
        if self.mode in ("cone", "a_gem"):
            self.reference.start_task(ctx)
        if self.mode == "gpm" and (missing := self.bases.missing(ctx)):
            self._learn(ctx, "general", range(ctx.num_general_rows), missing)
        if self.mode == "gpm" and ctx.strength(self.kind) > 0:
            self._clear_adapters(ctx)
        if self.record_trajectory:
            for name, parameter in ctx.params.items():
                if name not in self._start:
                    self._start[name] = parameter.detach().clone()

    def on_step_start(self, ctx: Context) -> None:
        """A new gradient on general rows where one is due."""
        self._numbers = {}
        if ctx.strength(self.kind) > 0 and self.mode in ("cone", "a_gem"):
            self.reference.start_step(ctx)

    # 8-13: what it does to rows, gradients and displacements

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Adds no term; counts this rank's general rows that are task rows."""
        if ctx.strength(self.kind) > 0 and self.curriculum.mixed > 0:
            rows = sum(source == GENERAL for source in micro.sources)
            self._numbers["general_rows"] = self._numbers.get("general_rows", 0.0) + rows
        return {}

    def edit_grads(self, ctx: Context) -> None:
        """`a_gem`: no step against the general gradient; `gpm`: none on old inputs."""
        strength = ctx.strength(self.kind)
        grads = {name: p.grad for name, p in ctx.params.items() if p.grad is not None}
        if strength <= 0 or not grads:
            return
        if self.mode == "gpm":
            for name, basis in self.bases.bases.items():
                if name in grads and basis.shape[1]:
                    grads[name].copy_(leave_out(grads[name], basis, strength))
        held = self.reference.held
        if self.mode == "a_gem" and held:
            against = [
                -held[name] if name in held else torch.zeros_like(g) for name, g in grads.items()
            ]
            projected, removed, cosine = half_space(list(grads.values()), against, strength)
            for grad, new in zip(grads.values(), projected, strict=True):
                if new is not grad:
                    grad.copy_(new)
            self._numbers |= {"applied_norm": removed, "cos_general": cosine}

    def edit_update(
        self, ctx: Context, old: Mapping[str, Tensor], delta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """`cone`: the nearest displacement within it; `gpm`: what is invisible on old inputs."""
        strength = ctx.strength(self.kind)
        if self.mode == "gpm":
            return self._leave_old_inputs(delta, strength)
        references = self.reference.of_parameters(ctx, old)
        if references:
            delta, numbers = hold_blocks(self._blocks(ctx, delta), references, delta, strength)
            self._numbers |= numbers
        self.reference.record(delta)
        return delta

    def _blocks(self, ctx: Context, delta: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
        if self.scope == "global":
            return [tuple(delta)]
        pairs = [(a, b) for a, b, _ in factor_names(ctx)]
        paired = {name for pair in pairs for name in pair}
        return [*pairs, *((name,) for name in delta if name not in paired)]

    def _leave_old_inputs(self, delta: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
        left, squares = dict(delta), [torch.zeros(())]
        for name, basis in self.bases.bases.items():
            if name in delta and basis.shape[1]:
                left[name] = leave_out(delta[name], basis, strength)
                squares.append((left[name] - delta[name]).square().sum().cpu())
        self._numbers["applied_norm"] = (
            float(torch.stack([s.double() for s in squares]).sum()) ** 0.5
        )
        return left

    # 16-17

    def on_task_end(self, ctx: Context) -> None:
        """What this task recorded and learnt is there for the next one."""
        if ctx.task_index + 1 >= ctx.num_tasks:
            return
        self.reference.end_task()
        if self.mode == "gpm" and self._domain is not None:
            self._learn(ctx, self._domain.store, self._domain.rows)

    def export_files(self, ctx: Context, directory: Path) -> None:
        """The run's displacement, where it was asked for."""
        if self.record_trajectory:
            write_trajectory(directory, displacement(ctx, self._start))

    def metrics(self) -> Mapping[str, float]:
        """What was changed in the last step, the angles, and the pace; see this strategy's page."""
        pace = {"held_back": 1.0 - self.curriculum.drawn, "general_share": self._general_share()}
        closed = {"closed_share": self.bases.share()} if self.mode == "gpm" else {}
        return {"applied_norm": 0.0, **pace, **closed, **self._numbers}

    def state_dict(self) -> StateDict:
        """References, bases, difficulties and the weights at the start; cursors belong to the sampler."""
        tensors = self.reference.tensors()
        tensors |= {f"basis/{name}": basis for name, basis in self.bases.bases.items()}
        tensors |= {f"start/{name}": weight for name, weight in self._start.items()}
        tensors |= {f"difficulty/{s}": values for s, values in self.curriculum.values.items()}
        return {**super().state_dict(), "tensors": tensors, "scalars": self.reference.scalars()}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved state.

        Raises:
            ValueError: It is another strategy's, or of other weights or rows.
        """
        super().load_state_dict(state)
        tensors: dict[str, Tensor] = state["tensors"]
        for key, value in tensors.items():
            topic, _, name = key.partition("/")
            if topic in ("held", "recorded", "start") and self._shapes.get(name) != value.shape:
                raise ValueError(f"state of progressive: {key} fits no weight of the run")
        widths = {name: shape[-1] for name, shape in self._shapes.items() if len(shape) == 2}
        self.bases.load(_topic(tensors, "basis"), widths)
        self.curriculum.values = _topic(tensors, "difficulty")
        check_difficulties(self.curriculum.values, self._sizes)
        self._start = _topic(tensors, "start")
        self.reference.load(tensors, state["scalars"])

    def _pace(self, ctx: Context) -> float:
        """0: off; else the factor on the general rows' share."""
        strength = ctx.strength(self.kind)
        return strength if self.mode == "none" else float(strength > 0)

    def _general_share(self) -> float:
        return self.curriculum.mixed / (1.0 + self.curriculum.mixed)

    def _learn(
        self, ctx: Context, store: str, rows: Sequence[int], only: frozenset[str] | None = None
    ) -> None:
        if not rows:
            raise ValueError("progressive: there are no general rows whose inputs gpm could keep")
        order = torch.randperm(len(rows), generator=ctx.generator(f"{self.kind}/{store}"))
        chosen = sorted(rows[i] for i in order[: self.gpm_rows].tolist())
        self.bases.learn(ctx, ctx.store_micros(store, chosen), only)

    def _clear_adapters(self, ctx: Context) -> None:
        """Fresh adapters read nothing of old inputs: with A M = 0, whatever B becomes, they see B A M = 0."""
        for name_A, _, pair in factor_names(ctx):
            basis = self.bases.bases.get(name_A)
            if basis is None or bool(pair.lora_B.any()):
                continue
            with torch.no_grad():
                left = leave_out(pair.lora_A, basis, ctx.strength(self.kind))
                if left.norm() > 1e-6 * pair.lora_A.norm():
                    pair.lora_A.copy_(left * (pair.lora_A.norm() / left.norm()))


def _topic(tensors: Mapping[str, Tensor], topic: str) -> dict[str, Tensor]:
    start = f"{topic}/"
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
