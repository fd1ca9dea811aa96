"""Distillation of logits and hidden states from the model the job started from."""

# Shape letters: B rows, T tokens, N selected positions, S those of distilled rows, D width.

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.base import Cost, Needs, StateDict, Strategy
from workers.strategies.batch import Forward, Micro, Stream, Term
from workers.strategies.context import Context, Decoding
from workers.strategies.distributions import CachedTeacher
from workers.strategies.generated import GeneratedRows
from workers.strategies.penalties import Divergence, divergence_sum
from workers.strategies.similarity import cka_to_base, hidden_distance_sum
from workers.strategies.topk import bucketed_kl_sum

KD_TOKENS = "kd_tokens"  # its own denominator: supervised positions of the distilled rows
GENERAL, GENERATED = "general", "generated"
HIDDEN_STRIDE = 4  # `auto`: the last layer and every fourth
NUMBERS = ("applied_norm", "penalty", "kd_nats", "kd_tokens")


class Distillation(Strategy):
    """Keeps the output distribution near that of the starting model, on chosen rows.

    Args:
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: Softens both distributions.
        beta: Weight of the teacher in `jsd`.
        jsd_rescale: Whether `jsd` is divided by beta (1 - beta).
        on: Sources whose rows are distilled; `auto` is replay (where there is any) and general rows.
        general_ratio: General and generated rows added to each step, each as a share of `batch_size`.
        every: Steps from one that distils to the next; what it does there is not made larger for that.
        teacher: `online` runs the starting model in every step that distils; `cached` takes the `top_k` of its
            distribution from a pass before training.
        top_k: Tokens kept of each position.
        cache_rows: General rows that are cached, at most; spread over the file.
        hidden_coef: Weight of the hidden states beside the logits.
        hidden_layers: Which of 0 to the model's number of layers; `auto` is the last and every fourth.
        hidden_loss: `mse` relative to the teacher's squared norm, or `cosine` distance; the mean over layers.
        generated_rows: Rows decoded at a time, by the model in training.
        generated_tokens: New tokens of each, at most.
        generated_temperature: Of the sampling.
        generated_prompts: What is continued: see `Decoding`.
        generate_every: Steps after which they are decoded anew; None is once, as a task starts.
        cka_rows: Rows over which CKA to the starting model is measured as a task ends; 0 is off.
    """

    kind: ClassVar[str] = "distillation"
    version: ClassVar[int] = 2

    def __init__(  # noqa: PLR0913 - the knobs of its configuration
        self,
        *,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        beta: float = 0.5,
        jsd_rescale: bool = True,
        on: Sequence[str] | Literal["auto"] = "auto",
        general_ratio: float = 0.25,
        every: int = 1,
        teacher: Literal["online", "cached"] = "online",
        top_k: int = 64,
        cache_rows: int = 4096,
        hidden_coef: float = 0.0,
        hidden_layers: Sequence[int] | Literal["auto"] = "auto",
        hidden_loss: Literal["mse", "cosine"] = "mse",
        generated_rows: int = 64,
        generated_tokens: int = 64,
        generated_temperature: float = 1.0,
        generated_prompts: Literal["prompt", "start"] = "prompt",
        generate_every: int | None = None,
        cka_rows: int = 32,
    ) -> None:
        self.divergence: Divergence = divergence
        self.temperature = temperature
        self.beta = beta
        self.jsd_rescale = jsd_rescale
        # A source without a stream has no rows, so `auto` may name replay whether or not it is on.
        self.sources = frozenset(("replay", GENERAL) if on == "auto" else on)
        self.general_ratio = general_ratio
        self.every = every
        self.is_cached = teacher == "cached"
        self.cache = CachedTeacher(self.sources, k=top_k, temperature=temperature)
        self.cache_rows = cache_rows
        self.hidden_coef = hidden_coef
        self.hidden_layers = hidden_layers
        self.hidden_loss = hidden_loss
        self.generate_every = generate_every
        self.cka_rows = cka_rows
        self.generated = GeneratedRows(
            self.kind,
            generated_rows,
            Decoding(generated_tokens, generated_temperature, generated_prompts),
        )
        self._is_due = every == 1
        self._asked: tuple[bool, int] | None = None  # what the streams in force were made for
        self._general: tuple[int, ...] = ()
        self._coef = 0.0
        self._tokens = 0
        self._nats: list[Tensor] = []
        self._squared_norms: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._last = self._zeros()
        self._cka: dict[str, float] = {}

    def needs(self) -> Needs:
        """The teacher's outputs on its sources; the layers follow from the model."""
        outputs = {"teacher_logits"} | ({"hidden_states"} if self.hidden_coef > 0 else set())
        return Needs(
            forward=frozenset() if self.is_cached else frozenset(outputs),
            teacher_sources=frozenset() if self.is_cached else self.sources,
            general_rows=GENERAL in self.sources,
            base_unmodified=True,
        )

    def step_needs(self, ctx: Context) -> Needs:
        """Nothing in steps that don't distil, nor with cached distributions."""
        if ctx.strength(self.kind) <= 0 or not self._is_due or self.is_cached:
            return Needs()
        layers = self._layers(ctx) if self.hidden_coef > 0 else frozenset()
        return Needs(
            forward=self.needs().forward,
            teacher_sources=self.sources,
            hidden_layers=layers,
            teacher_hidden_layers=layers,
        )

    def cost(self) -> Cost:
        """A teacher forward is a third of a step; rows of its own are read by student and teacher."""
        teacher = 0.0 if self.is_cached else 1 / 3
        added = self.general_ratio * len(self.sources & {GENERAL, GENERATED})
        domain = teacher if "domain" in self.sources else 0.0
        share = (added * (1 + teacher) + domain) / self.every
        return Cost(step_share=share, model_copies=0.0 if self.is_cached else 1.0)

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds `general` and `generated` rows, outside the task's cross-entropy, for steps that distil.

        Raises:
            ValueError: General rows are to be distilled and there are none.
        """
        self._asked = (self._is_due, self.generated.times)
        if ctx.strength(self.kind) <= 0:
            return streams
        if GENERAL in self.sources and not ctx.num_general_rows:
            raise ValueError("distillation: there are no general rows to distil on")
        if self.generated:
            self.generated.show(ctx)
        if not self._is_due:
            return streams
        added = []
        if GENERAL in self.sources and not any(stream.name == GENERAL for stream in streams):
            added.append((GENERAL, self._general_rows(ctx), GENERAL))
        if GENERATED in self.sources and self.generated:
            added.append((GENERATED, self.generated.indices, self.generated.store))
        share = self.general_ratio
        own = [Stream(n, rows, at, share, counts_as_task=False) for n, rows, at in added]
        return (*streams, *own)

    def on_task_start(self, ctx: Context) -> None:
        """Checks the layers; makes the cache where it is needed from the first step on.

        Raises:
            ValueError: There is no such layer.
        """
        if self.hidden_coef > 0 and max(self._layers(ctx), default=0) > ctx.num_layers:
            raise ValueError(
                f"distillation: hidden_layers: the model's are 0 to {ctx.num_layers}, not"
                f" {max(self._layers(ctx))}"
            )
        if self.is_cached and ctx.strength(self.kind) > 0:
            self.cache.fill(ctx)

    def on_step_start(self, ctx: Context) -> None:
        """Begins the sums of a step that distils; decodes rows where they are due."""
        self._coef = ctx.strength(self.kind)
        self._is_due = ctx.step % self.every == self.every - 1
        if self._coef > 0 and not self._is_due:
            return
        self._last = self._zeros()
        self._tokens = 0
        for sums in (self._nats, self._squared_norms, self._hidden):
            sums.clear()
        is_old = GENERATED in self.sources and self.generated.is_due(ctx, self.generate_every)
        if is_old and self._coef > 0:
            self.generated.make(ctx, base=False)

    def streams_changed(self, ctx: Context) -> bool:
        """Where this step distils and the last did not or the other way round, and where rows are new."""
        return self._coef > 0 and self._asked != (self._is_due, self.generated.times)

    def before_backward(self, ctx: Context, micros: Sequence[Micro]) -> None:
        """Caches the distributions of rows that streams have come to hold."""
        if self.is_cached and self._is_due and ctx.strength(self.kind) > 0:
            self.cache.fill(ctx)

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Supervised positions of the rows that are distilled."""
        if ctx.strength(self.kind) <= 0 or not self._is_due:
            return {}
        return {KD_TOKENS: float(micro.source_mask_N(self.sources).sum())}

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """The divergence, and the distance of hidden states, summed over the distilled positions.

        Raises:
            ValueError: The teacher has not read them.
        """
        coef = ctx.strength(self.kind)
        if coef <= 0 or not self._is_due or self.sources.isdisjoint(micro.sources):
            return ()
        own_N = micro.source_mask_N(self.sources)
        count = int(own_N.sum())
        if count == 0:
            return ()
        taught = None if self.is_cached else self._taught(out, own_N, count)
        if taught is None:
            kept = self.cache.look_up(micro)
            nats, squared = bucketed_kl_sum(
                out.logits_NV[own_N], kept, temperature=self.temperature
            )
        else:
            nats, squared = divergence_sum(
                out.logits_NV[own_N],
                taught[0],
                divergence=self.divergence,
                temperature=self.temperature,
                beta=self.beta,
                rescale=self.jsd_rescale,
            )
        self._tokens += count
        self._nats.append(nats.detach())
        self._squared_norms.append(squared)
        terms = [Term("distillation", nats, KD_TOKENS, coef)]
        if self.hidden_coef > 0 and taught is not None:
            at = micro.positions_N[own_N]
            distance = hidden_distance_sum(
                {layer: _at(out.hidden_BTD[layer], at) for layer in sorted(self._layers(ctx))},
                taught[1],
                kind=self.hidden_loss,
            )
            self._hidden.append(distance.detach())
            terms.append(Term("distillation_hidden", distance, KD_TOKENS, coef * self.hidden_coef))
        return terms

    def on_task_end(self, ctx: Context) -> None:
        """Measures CKA to the starting model, layer by layer; a finding on the job's log."""
        if ctx.strength(self.kind) <= 0 or not self.cka_rows:
            return
        store = GENERAL if ctx.num_general_rows else ctx.domain_store
        available = ctx.num_general_rows or ctx.num_training_rows
        by_layer = cka_to_base(ctx, store, _spread(available, self.cka_rows))
        values = [value for value in by_layer.values() if math.isfinite(value)]
        if not values:
            return
        self._cka = {"cka_min": min(values), "cka_last": by_layer[max(by_layer)]}
        ctx.note(
            "cka",
            f"Linear CKA to the base over {store} rows is {min(values):.4f} in the layer that moved most.",
            {
                "store": store,
                "task": ctx.task_name,
                "layers": {str(n): v for n, v in by_layer.items()},
            },
        )
        if self.is_cached:
            ctx.release_base()

    def metrics(self) -> Mapping[str, float]:
        """Of this rank's part of the last step that distilled.

        `kd_nats` is the mean divergence of a token, `penalty` that times the strength, and
        `applied_norm` the norm of the penalty's gradient with respect to the student's logits. `hidden` is
        the mean distance of hidden states. After a task has ended, `cka_min` and `cka_last` are CKA to the
        starting model in the layer that moved most and in the last one.
        """
        if self._tokens:
            nats = _sum(self._nats) / self._tokens
            self._last = {
                "applied_norm": self._coef * _sum(self._squared_norms) ** 0.5 / self._tokens,
                "penalty": self._coef * nats,
                "kd_nats": nats,
                "kd_tokens": float(self._tokens),
            }
            if self._hidden:
                self._last["hidden"] = _sum(self._hidden) / self._tokens
        return {**self._last, **self._cka}

    def state_dict(self) -> StateDict:
        """The rows that were decoded, and the numbers that steps without distillation repeat."""
        scalars = {
            **self.generated.scalars(),
            "last": dict(self.metrics()),
            "cka": self._cka,
            "is_due": self._is_due,
        }
        return {**super().state_dict(), "tensors": self.generated.tensors(), "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up decoded rows.

        Raises:
            ValueError: They are not all there, or the state is another strategy's.
        """
        super().load_state_dict(state)
        scalars = state["scalars"]
        self.generated.load(state["tensors"], scalars)
        self._cka = dict(scalars["cka"])
        self._last = {k: v for k, v in scalars["last"].items() if k not in self._cka}
        self._is_due = bool(scalars["is_due"])
        self._tokens = 0

    def _zeros(self) -> dict[str, float]:
        return dict.fromkeys((*NUMBERS, "hidden") if self.hidden_coef > 0 else NUMBERS, 0.0)

    def _layers(self, ctx: Context) -> frozenset[int]:
        if isinstance(self.hidden_layers, str):
            every = range(HIDDEN_STRIDE, ctx.num_layers + 1, HIDDEN_STRIDE)
            return frozenset([*every, ctx.num_layers])
        return frozenset(self.hidden_layers)

    def _general_rows(self, ctx: Context) -> tuple[int, ...]:
        if not self._general:
            most = self.cache_rows if self.is_cached else ctx.num_general_rows
            self._general = _spread(ctx.num_general_rows, most)
        return self._general

    def _taught(
        self, out: Forward, own_N: Tensor, count: int
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """The teacher's logits and hidden states at the positions that are distilled, in order."""
        if out.teacher_logits_NV is None or out.teacher_mask_N is None:
            raise ValueError("distillation: the forward came without the teacher's logits")
        taught = own_N[out.teacher_mask_N]  # the teacher may have read other rows for others
        if int(taught.sum()) != count:
            raise ValueError("distillation: the teacher has not read all of its rows")
        hidden = {layer: values[taught] for layer, values in out.teacher_hidden_SD.items()}
        return out.teacher_logits_NV[taught], hidden


def _spread(available: int, wanted: int) -> tuple[int, ...]:
    """At most so many of the indices, at equal distances."""
    count = min(available, wanted)
    return tuple(index * available // count for index in range(count))


def _at(values_BTD: Tensor, positions_S: Tensor) -> Tensor:
    return values_BTD.reshape(-1, values_BTD.shape[-1]).index_select(0, positions_S)


def _sum(parts: Sequence[Tensor]) -> float:
    return float(torch.stack(list(parts)).double().sum())
