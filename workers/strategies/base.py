"""The interface under which every strategy composes: the hook order and the normalisation contract.

Hook order of a step (the numbers are those of the strategy cards; the order is the contract, never the
order in which strategies were listed, so the loop calls them sorted by `kind`):

    SETUP   1 edit_model   2 edit_param_groups   3 edit_streams
    TASK    4 on_task_start
    STEP    5 on_step_start
            6 edit_batch   7 forward_needs   8 count_terms + loss_terms      for each micro-batch
            9 add_grads                                                       once, after the all-reduce
           10 edit_grads
           11 clip (the loop)   12 optimizer.step (the loop)
           13a prox_pulls   13b/c edit_update
           14 on_step_end; then zero_grad (the loop)
    EVAL   15 on_eval (metrics only)
    END    16 on_task_end   17 export

Normalisation: total = sum over micro-batches of coef_k * numerator_k / D_k, where D_k is the count of
term k over all micro-batches and ranks of the step (`count_terms`), known before the first backward.
"""

# Shape letters: B rows, T tokens, N selected positions of a micro-batch, V vocabulary.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

StateDict = dict[str, Any]
TALLY_INTERVAL = 20  # steps


@dataclass(frozen=True)
class Stream:
    """A source of rows in every step.

    Args:
        name: `domain`, `general`, `replay`, ...; becomes the rows' `source`.
        rows: Indices into the named store (`training` or `general`) that the stream draws from.
        store: Which tokenised store the indices point into.
        rows_per_step: Rows added to each step, as a share of `batch_size`; error diffusion makes the
            cumulative count exact. The domain stream has 1.0.
        counts_as_task: Whether its supervised tokens enter the task cross-entropy.
    """

    name: str
    rows: tuple[int, ...]
    store: str
    rows_per_step: float
    counts_as_task: bool


@dataclass(frozen=True)
class Micro:
    """One right-padded micro-batch; no attention mask is needed for causal models.

    `positions_N` are flat indices (row * T + column) of the positions whose *next* token is supervised,
    in row-major order; everything with an N is aligned with them. `row_of_N` gives each position's row.
    """

    input_ids_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor
    row_of_N: Tensor
    weights_N: Tensor  # float32 loss weight of the position (1 unless the row says otherwise)
    sources: tuple[str, ...]  # one a row
    sample_ids: tuple[int, ...]  # index of the row in its store
    is_task_B: Tensor  # bool: the row's tokens count as task cross-entropy

    def source_mask_N(self, names: frozenset[str]) -> Tensor:
        """Bool mask of the positions whose row comes from one of the named streams."""
        rows_B = torch.tensor([s in names for s in self.sources], device=self.row_of_N.device)
        return rows_B[self.row_of_N]

    def split(self, num_rows: int) -> "Iterator[Micro]":
        """Parts of so many rows, without the columns behind their last supervised position."""
        width = self.input_ids_BT.shape[1]
        for start in range(0, len(self.sources), num_rows):
            rows = slice(start, start + num_rows)
            own = (self.row_of_N >= start) & (self.row_of_N < start + num_rows)
            row_of_N = self.row_of_N[own] - start
            columns_N = self.positions_N[own] % width
            new_width = int(columns_N.max()) + 1 if columns_N.numel() else 1
            yield replace(
                self,
                input_ids_BT=self.input_ids_BT[rows, :new_width],
                positions_N=row_of_N * new_width + columns_N,
                targets_N=self.targets_N[own],
                row_of_N=row_of_N,
                weights_N=self.weights_N[own],
                sources=self.sources[rows],
                sample_ids=self.sample_ids[rows],
                is_task_B=self.is_task_B[rows],
            )


@dataclass(frozen=True)
class Forward:
    """What one forward gave: logits at the selected positions alone.

    `teacher_logits_NV` has rows only where the teacher was asked for (`teacher_mask_N`), in order.
    """

    logits_NV: Tensor
    teacher_logits_NV: Tensor | None = None
    teacher_mask_N: Tensor | None = None
    hidden_BTD: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One addend of the loss: sum over the micro-batch, before division by its step-wide count."""

    name: str
    numerator: Tensor
    denominator_key: str
    coef: float


@dataclass(frozen=True)
class Needs:
    """What a strategy asks of the run; the same for its whole life."""

    forward: frozenset[str] = frozenset()  # of `teacher_logits`, `hidden_states`
    teacher_sources: frozenset[str] = frozenset()  # rows the teacher must read
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


@dataclass
class Tally:
    """What a quadratic penalty does in a step, measured every 20th step: it costs as much as the pull.

    Steps 0 and 1 are measured, too: at step 0 a gradient's pull is still 0. Tensors stay on their device until they are read.
    """

    squared_norms: list[Tensor] = field(default_factory=list)
    penalties: list[Tensor] = field(default_factory=list)
    capped: list[Tensor] = field(default_factory=list)  # 1 for a block whose cap bound, else 0
    last: dict[str, float] = field(default_factory=dict)  # of the last measured step

    def begin(self, step: int, strength: float) -> "Tally | None":
        """The tally to fill in during this step; None in steps that are not measured."""
        self.read()
        if strength <= 0:
            self.last = {}
            return None
        return self if not self.last or step % TALLY_INTERVAL == 1 else None

    def read(self) -> dict[str, float]:
        """`applied_norm`, `penalty` and, where blocks can be capped, `capped_share`."""
        if self.squared_norms:
            self.last = {
                "applied_norm": _total(self.squared_norms) ** 0.5,
                "penalty": _total(self.penalties),
            }
            if self.capped:
                self.last["capped_share"] = _total(self.capped) / len(self.capped)
            self.squared_norms, self.penalties, self.capped = [], [], []
        return self.last or {"applied_norm": 0.0, "penalty": 0.0}

    def save(self) -> dict[str, float]:
        """What a resumed run needs to measure the same steps."""
        self.read()
        return dict(self.last)


@dataclass(frozen=True)
class Pull:
    """A quadratic pull (13a) of one parameter toward `anchor` with coefficient `strength * importance`.

    The loop sums all pulls of a parameter into one implicit step
    theta <- (theta + lr * sum_k c_k a_k) / (1 + lr * sum_k c_k), stable for any strength.
    """

    strength: float
    importance: Tensor | None  # shape of the parameter, float32; None means 1 everywhere
    anchor: Tensor
    tally: Tally | None = None  # of the strategy; filled in while the pull is applied
    applied_sq: Tensor | None = None  # scalar; the squared displacement by this pull is added to it


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear layer: effective change = scale * B @ A on `base_weight` (d_out, d_in)."""

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    base_weight: nn.Parameter


@dataclass
class Context:
    """What the loop shows to strategies. Strategies read it; only the loop writes.

    `coefs` maps a strategy's kind to its strength, frozen for a step. `params` are the trainable
    parameters by canonical name. `learning_rates` gives each parameter's rate in this step.
    """

    model: nn.Module
    params: dict[str, nn.Parameter]
    lora_pairs: tuple[LoraPair, ...]
    coefs: dict[str, float]
    run_seed: int
    device: torch.device
    batch_size: int
    num_training_rows: int
    num_general_rows: int
    step: int = 0
    task_index: int = 0
    rank: int = 0
    world_size: int = 1
    learning_rates: dict[str, float] = field(default_factory=dict)
    #: Sums a tensor in place over ranks; nothing on one rank.
    all_reduce: Callable[[Tensor], None] = lambda _: None
    #: Micro-batches of the given general rows, shared out over the ranks: for passes of a strategy's own.
    general_micros: Callable[[Sequence[int]], Iterator[Micro]] = lambda _: iter(())
    #: Student forward with gradient at a micro-batch's selected positions.
    forward: Callable[[Micro], Forward] | None = None
    #: Logits of the starting model at the positions of the masked rows, without gradient.
    base_forward: Callable[[Micro, Tensor], Tensor] | None = None
    #: Loads or makes a set of tensors that follow from (model, data, settings) alone; kept across jobs.
    cached: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = lambda _, make: (
        make()
    )

    def strength(self, kind: str) -> float:
        """The coefficient in force of a strategy."""
        return self.coefs[kind]

    def generator(self, kind: str) -> torch.Generator:
        """A fresh CPU generator seeded by (run seed, strategy, task): never the global one."""
        generator = torch.Generator()
        mixed = int.from_bytes(f"{self.run_seed}/{kind}/{self.task_index}".encode(), "little")
        return generator.manual_seed(mixed % (2**63 - 25))


class Strategy:
    """A mitigation method. Every hook does nothing unless a subclass says otherwise.

    `kind` is the `type` of its configuration. At strength 0 the run must be bit-identical to one without
    the strategy (G1), from the first step on; a strategy may be turned on at any later step.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    def needs(self) -> Needs:
        """What the run must provide."""
        return Needs()

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

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """3: adds streams of rows. Called again whenever a coefficient changed."""
        return streams

    # 4-5
    def on_task_start(self, ctx: Context) -> None:
        """4: anchors, importance passes, teachers."""

    def on_step_start(self, ctx: Context) -> None:
        """5: schedules."""

    # 6-8
    def edit_batch(self, ctx: Context, micro: Micro) -> Micro:
        """6: changes a micro-batch."""
        return micro

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """8: this micro-batch's share of the counts that its terms are divided by."""
        return {}

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """8: addends of the loss."""
        return ()

    # 9-10
    def add_grads(self, ctx: Context) -> None:
        """9: closed-form gradients of data-free penalties."""

    def edit_grads(self, ctx: Context) -> None:
        """10: projections of the gradient."""

    # 13-14
    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """13a: pulls by canonical parameter name."""
        return {}

    def edit_update(self, ctx: Context, name: str, old: Tensor, delta: Tensor) -> Tensor:
        """13b/c: constrains the displacement of one parameter; needs `snapshot`."""
        return delta

    def on_step_end(self, ctx: Context) -> None:
        """14: accumulators; gradients are still there."""

    # 15-17
    def on_eval(self, ctx: Context, report: Mapping[str, float]) -> None:
        """15: metrics only."""

    def on_task_end(self, ctx: Context) -> None:
        """16: importance of the finished task, memory fill."""

    def export(self, ctx: Context, model: nn.Module) -> nn.Module:
        """17: merge."""
        return model

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


def _total(parts: Sequence[Tensor]) -> float:
    return float(torch.stack(list(parts)).double().sum()) if parts else 0.0
