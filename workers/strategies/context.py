"""What the loop shows to strategies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workers.strategies.batch import Forward, Micro, Stream, TokenRow


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear layer: effective change = scale * B @ A on `base_weight` (d_out, d_in).

    Where the base is quantised, `base_weight` has shape and type alone, without values; `whole` has both.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    base_weight: nn.Parameter
    adapter: str = "default"
    dense: Callable[[], AbstractContextManager[nn.Parameter]] | None = None  # of a quantised base

    def whole(self) -> AbstractContextManager[nn.Parameter]:
        """Inside, the base weight as the layer computes with it, of which a gradient can be taken."""
        return nullcontext(self.base_weight) if self.dense is None else self.dense()


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
