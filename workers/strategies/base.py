"""The interface under which every strategy composes: the hook order and the normalisation contract.

Hook order of a step (the numbers are those of the strategy cards; the order is the contract, never the
order in which strategies were listed, so the loop calls them sorted by `kind`):

    SETUP   1 edit_model   2 edit_param_groups   3 edit_streams
    TASK    4 on_task_start
    STEP    5 on_step_start
            6 edit_batch   7 step_needs   8 count_terms + loss_terms         for each micro-batch
              (once, between 6 and 7: before_backward, for terms that are functions of the whole step)
              (exclusive: a step owner's compute_grads decides which micro-batches are read, and where)
           8b read_grads                                                      once, after the all-reduce
            9 add_grads                                                       once, after the all-reduce
           10 edit_grads; then held parameters lose their gradients
           11 clip (the loop)   12 optimizer.step (the loop)
           13a prox_pulls   13b/c edit_update, in the order of `update_rank`
           14 on_step_end; then zero_grad (the loop)
    EVAL   15 on_eval (metrics only)
    END    16 on_task_end, then on_publish   17 export

Normalisation: total = sum over micro-batches of coef_k * numerator_k / D_k, where D_k is the count of
term k over all micro-batches and ranks of the step (`count_terms`), known before the first backward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from workers.strategies.batch import Backward, Forward, Micro, Stream, Term
from workers.strategies.context import Context
from workers.strategies.pulls import Pull

StateDict = dict[str, Any]


@dataclass(frozen=True)
class OptimizerChoice:
    """The algorithm of hook 12. The defaults are what a run takes when no strategy chooses.

    Args:
        name: `adamw`, `radam` (both with decoupled decay), `sgd` or `adafactor`.
        betas: Of `adamw` and `radam`.
        epsilon: Of `adamw` and `radam`.
        momentum: Of `sgd`.
    """

    name: Literal["adamw", "radam", "sgd", "adafactor"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    momentum: float = 0.9


@dataclass(frozen=True)
class Needs:
    """What a strategy asks of the run: for its whole life, or for one step."""

    forward: frozenset[str] = frozenset()  # of `teacher_logits`, `hidden_states`
    teacher_sources: frozenset[str] = frozenset()  # rows the teacher must read
    hidden_layers: frozenset[int] = frozenset()  # of the student; 0 to `ctx.num_layers`
    teacher_hidden_layers: frozenset[int] = frozenset()
    general_rows: bool = False
    base_unmodified: bool = False  # relies on the starting model staying reachable
    snapshot: bool = False  # implements 13b/c, so the loop keeps the weights from before the step
    step_owner: bool = False  # replaces 6-8; at most one


@dataclass(frozen=True)
class Cost:
    """Extra cost: training steps once, share of a step each step, model copies, trainable copies."""

    steps_once: float = 0.0
    step_share: float = 0.0
    model_copies: float = 0.0
    trainable_copies: float = 0.0


class Strategy:
    """A mitigation method. Every hook does nothing unless a subclass says otherwise.

    `kind` is the `type` of its configuration. At strength 0 the run must be bit-identical to one without
    the strategy (G1), from the first step on; a strategy may be turned on at any later step.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    update_rank: ClassVar[int] = 0  # of 13: 0 scaling and subspaces, 1 cones and outer steps

    def needs(self) -> Needs:
        """What the run must provide."""
        return Needs()

    def step_needs(self, ctx: Context) -> Needs:
        """7: what this step's forwards must give; nothing while the strategy is turned off."""
        return self.needs() if ctx.strength(self.kind) > 0 else Needs()

    def cost(self) -> Cost:
        """What it costs, for estimates."""
        return Cost()

    # 1-3
    def edit_model(self, ctx: Context, model: nn.Module) -> nn.Module:
        """1: adapters, expansion."""
        return model

    def edit_param_groups(self, ctx: Context, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """2: learning rate and decay per group."""
        return groups

    def choose_optimizer(self, ctx: Context) -> OptimizerChoice | None:
        """2: the algorithm that moves the parameters; None leaves it to others. At most one may choose."""
        return None

    def edit_trainable(self, ctx: Context, names: frozenset[str]) -> frozenset[str]:
        """2: which of the run's parameters the task at hand trains; called whenever a task is entered."""
        return names

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """3: adds streams of rows. Called again whenever a coefficient changed."""
        return streams

    # 4-5
    def on_task_start(self, ctx: Context) -> None:
        """4: anchors, importance passes, teachers."""

    def on_step_start(self, ctx: Context) -> None:
        """5: schedules."""

    def streams_changed(self, ctx: Context) -> bool:
        """Whether `edit_streams` is to be asked again before this step's rows are drawn."""
        return False

    # 6-8
    def edit_batch(self, ctx: Context, micro: Micro) -> Micro:
        """6: changes a micro-batch."""
        return micro

    def before_backward(self, ctx: Context, micros: Sequence[Micro]) -> None:
        """Looks at this rank's micro-batches of the step, on every rank in every step (there may be none)."""

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """8: this micro-batch's share of the counts that its terms are divided by."""
        return {}

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """8: addends of the loss."""
        return ()

    def compute_grads(self, ctx: Context, micros: Sequence[Micro], backward: Backward) -> None:
        """Replaces 6 to 8 where `step_needs` says `step_owner`: leaves the step's gradients in `grad`.

        `backward(micros)` adds the gradient of the task's and the strategies' terms over these micro-batches,
        divided by their counts over all ranks, and summed over ranks: `grad` must be empty when it is called.
        It is collective: every rank calls it equally often. `micros` are this rank's of the step.
        """
        backward(micros)

    def read_grads(self, ctx: Context) -> None:
        """8b: looks at the loss's gradient, summed over ranks, before any strategy adds to it or clips it."""

    # 9-10
    def add_grads(self, ctx: Context) -> None:
        """9: closed-form gradients of data-free penalties."""

    def edit_grads(self, ctx: Context) -> None:
        """10: projections of the gradient."""

    def held(self, ctx: Context) -> frozenset[str]:
        """10: parameters that this step must not move: after `edit_grads` the loop takes their gradients
        away, and neither pulls nor `edit_update` reach them.
        """
        return frozenset()

    # 13-14
    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """13a: pulls by canonical parameter name."""
        return {}

    def edit_update(
        self, ctx: Context, old: Mapping[str, Tensor], delta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """13b/c: constrains the displacement, by parameter name; needs `snapshot`."""
        return delta

    def on_step_end(self, ctx: Context) -> None:
        """14: accumulators; gradients are still there."""

    # 15-17
    def on_eval(self, ctx: Context, report: Mapping[str, float]) -> None:
        """15: metrics only."""

    def on_task_end(self, ctx: Context) -> None:
        """16: importance of the finished task, memory fill."""

    def on_publish(self, ctx: Context) -> None:
        """16: after the last task's end, before the report: brings the model into the form to publish."""

    def export(self, ctx: Context, model: nn.Module) -> nn.Module:
        """17: merge."""
        return model

    def export_files(self, ctx: Context, directory: Path) -> None:
        """17: what is published beside the weights; only rank 0 is asked."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the last step, reported as `strategy/<kind>/<name>`; `applied_norm` among them."""
        return {}

    def state_dict(self) -> StateDict:
        """`tensors` by canonical name (float32) and `scalars`, all that a resumed run needs."""
        return {"kind": self.kind, "version": self.version, "tensors": {}, "scalars": {}}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved state.

        Raises:
            ValueError: Another kind or version, a missing name or a wrong shape.
        """
        if (state["kind"], state["version"]) != (self.kind, self.version):
            raise ValueError(
                f"state of {state['kind']} v{state['version']} given to {self.kind} v{self.version}"
            )


def check_tensors(
    kind: str, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> None:
    """Refuses saved tensors that do not fit the run.

    Raises:
        ValueError: A missing or unknown name, or a wrong shape.
    """
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        problem = "is missing" if odd in expected else "belongs to no trained weight"
        raise ValueError(f"state of {kind}: {odd} {problem}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"state of {kind}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}"
            )
