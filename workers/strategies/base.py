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

# Shape letters: B rows, T tokens, N selected positions of a micro-batch, V vocabulary.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

StateDict = dict[str, Any]
TokenRow = tuple[list[int], list[float]]  # token ids, and the loss weight of each as a target
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
        is_uniform: Each step draws afresh, uniformly and no row twice, and epochs stand still meanwhile:
            for rows that are a part of the stream's for a while.
    """

    name: str
    rows: tuple[int, ...]
    store: str
    rows_per_step: float
    counts_as_task: bool
    is_uniform: bool = False

    @property
    def key(self) -> str:
        """What its cursor is kept under: the rows of a later stage are another stream of the same name."""
        return self.name if self.store in ("training", "general") else f"{self.name}@{self.store}"


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

    def join(self, other: "Micro") -> "Micro":
        """Both, the other's rows behind these; the narrower one is padded with token 0."""
        own_rows, width = self.input_ids_BT.shape
        other_rows, other_width = other.input_ids_BT.shape
        new_width = max(width, other_width)
        ids_BT = self.input_ids_BT.new_zeros((own_rows + other_rows, new_width))
        ids_BT[:own_rows, :width] = self.input_ids_BT
        ids_BT[own_rows:, :other_width] = other.input_ids_BT
        parts = [(self, 0, width), (other, own_rows, other_width)]

        def rows(micro: "Micro", shift: int) -> Tensor:
            return micro.row_of_N + shift

        return Micro(
            input_ids_BT=ids_BT,
            positions_N=torch.cat(
                [rows(m, k) * new_width + m.positions_N % w for m, k, w in parts]
            ),
            targets_N=torch.cat([self.targets_N, other.targets_N]),
            row_of_N=torch.cat([rows(m, k) for m, k, _ in parts]),
            weights_N=torch.cat([self.weights_N, other.weights_N]),
            sources=self.sources + other.sources,
            sample_ids=self.sample_ids + other.sample_ids,
            is_task_B=torch.cat([self.is_task_B, other.is_task_B]),
        )

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


class Backward(Protocol):
    """Adds gradients to `grad`; see `Strategy.compute_grads`."""

    def __call__(self, micros: Sequence[Micro], /, *, task_only: bool = False) -> None:
        """Of the loss over these micro-batches; `task_only` leaves the strategies' terms out."""
        ...


@dataclass(frozen=True)
class Forward:
    """What one forward gave: logits at the selected positions alone.

    `teacher_logits_NV` has rows only where the teacher was asked for (`teacher_mask_N`), in order; the
    teacher's hidden states are those at the same positions. Hidden states are keyed by layer: 0 is the
    embeddings' output, the last is what the head reads.
    """

    logits_NV: Tensor
    teacher_logits_NV: Tensor | None = None
    teacher_mask_N: Tensor | None = None
    hidden_BTD: Mapping[int, Tensor] = field(default_factory=dict)
    teacher_hidden_SD: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One addend of the loss: sum over the micro-batch, before division by its step-wide count."""

    name: str
    numerator: Tensor
    denominator_key: str
    coef: float


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
    adapter: str = "default"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run that has one a task, in the tasks' order; those of tasks to come change nothing.

    Args:
        names: Of the adapters, by task.
        params: Canonical names of each adapter's parameters.
        readers: By adapter and layer, what it reads of the layer's input: (rank, d_in).
        share: Parameters of one adapter, as a share of the base's.
        activate: Lets these alone act, in sum; none of them leaves the base. Gradients' flags stay.
        merge: Makes `merged` from these and lets it alone act: (names, method, and as keywords `weights`,
            `density`, `rank` and `seed`); what is told of it.
    """

    names: tuple[str, ...]
    params: Mapping[str, frozenset[str]]
    readers: Mapping[str, Mapping[str, nn.Parameter]]
    share: float
    activate: Callable[[Sequence[str]], None]
    merge: Callable[..., Mapping[str, float]]


@dataclass(frozen=True)
class Pairs:
    """Counterparts of a store's rows: the same answer to the same question, put in another way."""

    store: str  # where the counterparts lie
    row_of: Sequence[int]  # by row of the store they belong to; -1: none
    digest: str  # of what they are


@dataclass(frozen=True)
class Decoding:
    """How `Context.sample` continues rows.

    Args:
        num_tokens: New ones at most, fewer after a closing token and at the model's context.
        temperature: Divides the logits; above 0.
        prompts: `prompt` is what comes before a row's first supervised token (at least one token); `start`
            is what all rows of the store begin with (a template's first marks), else the row's first token.
    """

    num_tokens: int
    temperature: float = 1.0
    prompts: Literal["prompt", "start"] = "prompt"


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
    num_layers: int = 0  # of the model: hidden states are numbered 0 to this
    num_tasks: int = 1
    task_name: str = ""
    step: int = 0
    task_first_step: int = 0
    task_steps: int = 0  # accepted steps of this task
    task_index: int = 0
    rank: int = 0
    world_size: int = 1
    learning_rates: dict[str, float] = field(default_factory=dict)
    #: What a group's `base_lr` is multiplied by in a step of the task at hand, counted from its first.
    schedule: Callable[[int], float] = lambda _: 1.0
    #: Sums a tensor in place over ranks; nothing on one rank.
    all_reduce: Callable[[Tensor], None] = lambda _: None
    #: Micro-batches of the given general rows, shared out over the ranks: for passes of a strategy's own.
    general_micros: Callable[[Sequence[int]], Iterator[Micro]] = lambda _: iter(())
    #: The same of the rows of any store: `training`, `training-1` (the second stage's), `general`, ...
    store_micros: Callable[[str, Sequence[int]], Iterator[Micro]] = lambda _, __: iter(())
    #: One micro-batch of a store's rows in the order given, whole on every rank: (source, store, rows).
    rows_micro: Callable[[str, str, Sequence[int]], Micro] | None = None
    #: Rows of each store.
    store_sizes: Mapping[str, int] = field(default_factory=dict)
    #: Adds a store of (token ids, loss weight of each token as a target) rows, for streams of a strategy's own.
    add_store: Callable[[str, "Sequence[TokenRow]"], None] | None = None
    #: Sampled continuations of rows: (store, rows, decoding, generator, by the starting model in place of the
    #: model as it stands); see `workers.training.sampling`.
    sample: "Callable[..., list[TokenRow]] | None" = None
    #: Unit-norm representations (rows, dim) of a store's rows by the job's encoder.
    embed: Callable[[str, Sequence[int]], Tensor] | None = None
    #: Hash of what makes them: keys of different hashes can't be compared.
    encoder: Callable[[], str] = lambda: ""
    #: The rows' texts, without special tokens.
    texts: Callable[[str, Sequence[int]], list[str]] | None = None
    #: Which of a store's rows share text with an item of a watched benchmark.
    overlaps: Callable[[str, Sequence[int]], Sequence[bool]] = lambda _, rows: [False] * len(rows)
    #: Student forward with gradient at a micro-batch's selected positions, with the hidden states asked for.
    forward: Callable[..., Forward] | None = None
    #: Logits of the starting model at the positions of the masked rows, without gradient.
    base_forward: Callable[[Micro, Tensor], Tensor] | None = None
    #: Its hidden states there, by layer: (micro, mask, layers).
    base_hidden: Callable[[Micro, Tensor, frozenset[int]], Mapping[int, Tensor]] | None = None
    #: The same by the starting model: means of its last hidden states over what comes before an answer.
    represent: Callable[[str, Sequence[int]], Tensor] | None = None
    #: Where the run has an adapter for each task.
    adapters: Adapters | None = None
    #: Counterparts of the rows of a store, by store.
    pairs: Mapping[str, Pairs] = field(default_factory=dict)
    #: The environment that each row of a store names ("": none), by store; only stores where some row does.
    environments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    #: Local directories of the other models that the job names.
    models: Mapping[str, str] = field(default_factory=dict)
    #: Puts a finding on the job's log: (code, message, data).
    note: Callable[[str, str, Mapping[str, Any]], None] = lambda _, __, ___: None
    #: Loads or makes a set of tensors that follow from (model, data, settings) alone; kept across jobs.
    cached: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = lambda _, make: (
        make()
    )

    #: The streams in force, as every strategy left them.
    streams: tuple[Stream, ...] = ()
    #: Lets go of a copy of the starting model, where one was loaded; it is loaded again when it is asked.
    release_base: Callable[[], None] = lambda: None

    @property
    def domain_store(self) -> str:
        """The store of the rows of the task at hand."""
        return f"training-{self.task_index}" if self.task_index else "training"

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


def _total(parts: Sequence[Tensor]) -> float:
    return float(torch.stack(list(parts)).double().sum()) if parts else 0.0
