"""Replay: rows of general data, of the starting model's own text, or of earlier domains in every step's mix."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.strategies.base import Cost, Needs, StateDict, Strategy
from workers.strategies.batch import Forward, Micro, Stream, Term
from workers.strategies.context import Context, Decoding
from workers.strategies.distributions import (
    STORED,
    CachedTeacher,
    Distributions,
    look_up,
    make_distributions,
)
from workers.strategies.generated import GeneratedRows
from workers.strategies.modes import evaluating
from workers.strategies.topk import bucketed_kl_sum

SOURCE = "replay"
EARLIER = "earlier"  # rows of finished domains: the starting model is no teacher on them
CE_TOKENS, DER_TOKENS = "replay_tokens", "der_tokens"


class Replay(Strategy):
    """Keeps a small store of other rows in training; the strength is the mix ratio.

    The strength counts rows added to each step over all replayed sources, as a share of `batch_size`.

    Args:
        source: `general` rows; `generated`, decoded by the starting model before training; or `none`, so
            that only earlier domains' rows are replayed.
        store_fraction: Share of the general rows that is stored, drawn once.
        min_store_rows: At least as many, as far as there are.
        weighting: `tokens` counts a replayed token as `der_beta` tokens in the task's one mean; `fixed` adds
            `der_beta` times the mean over replayed tokens, however many there are.
        sampling: How the mix ratio is shared by general rows and each earlier domain's: alike (`quota`), or
            by the rows that are stored (`uniform`).
        domain_store_fraction: Share of a finished domain's rows that later tasks replay.
        der_alpha: Coefficient of the divergence from the distributions stored with the rows (DER).
        der_beta: Weight of the replayed labels (DER++).
        der_temperature: Of that divergence.
        top_k: Tokens kept of each stored position.
        generated_rows: Rows decoded.
        generated_tokens: New tokens of each, at most.
        generated_temperature: Of the sampling.
        generated_prompts: What is continued: see `Decoding`.
    """

    kind: ClassVar[str] = "replay"
    version: ClassVar[int] = 2

    def __init__(  # noqa: PLR0913 - the knobs of its configuration
        self,
        *,
        source: Literal["general", "generated", "none"] = "general",
        store_fraction: float = 0.05,
        min_store_rows: int = 32,
        weighting: Literal["tokens", "fixed"] = "tokens",
        sampling: Literal["quota", "uniform"] = "quota",
        domain_store_fraction: float = 0.0,
        der_alpha: float = 0.0,
        der_beta: float = 1.0,
        der_temperature: float = 1.0,
        top_k: int = 64,
        generated_rows: int = 256,
        generated_tokens: int = 64,
        generated_temperature: float = 1.0,
        generated_prompts: Literal["prompt", "start"] = "start",
    ) -> None:
        self.source = source
        self.store_fraction = store_fraction
        self.min_store_rows = min_store_rows
        self.is_fixed = weighting == "fixed"
        self.sampling = sampling
        self.domain_store_fraction = domain_store_fraction
        self.der_alpha = der_alpha
        self.der_beta = der_beta
        self.der_temperature = der_temperature
        self.top_k = top_k
        self.store: tuple[int, ...] = ()  # indices into the general rows, ascending
        self.earlier: dict[str, tuple[int, ...]] = {}  # rows of finished domains, by store
        self.generated = GeneratedRows(
            self.kind,
            generated_rows,
            Decoding(generated_tokens, generated_temperature, generated_prompts),
        )
        self.cache = CachedTeacher({SOURCE}, k=top_k, temperature=der_temperature)
        self._stored: dict[str, Distributions] = {}  # of finished domains, by store
        self._asked: tuple[int, int] | None = None  # what the streams in force were made for
        self._mix = 0.0
        self._rows = 0
        self._tokens = 0.0
        self._all_tokens = 0.0
        self._der: list[Tensor] = []
        self._der_tokens = 0

    def needs(self) -> Needs:
        """General rows where it replays them; the starting model for what it decodes or stores of it."""
        return Needs(
            general_rows=self.source == "general",
            base_unmodified=self.source == "generated" or self.der_alpha > 0,
        )

    def cost(self) -> Cost:
        """A row added costs what a row costs."""
        return Cost(step_share=self._mix)

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds `replay`, and `earlier` for each finished domain, while it is turned on.

        Raises:
            ValueError: There are no general rows to replay.
        """
        if not self.store and self.source == "general":
            wanted = math.ceil(self.store_fraction * ctx.num_general_rows)
            wanted = max(wanted, self.min_store_rows)
            self.store = _stretches(ctx, self.kind, wanted, ctx.num_general_rows)
        self._mix = ctx.strength(self.kind)
        self._asked = (self.generated.times, len(self.earlier))
        if self._mix <= 0:
            return streams
        sources = [(_earlier(store), rows, store) for store, rows in sorted(self.earlier.items())]
        if self.source == "general":
            if not self.store:
                raise ValueError("replay: there are no general rows to replay")
            sources.append((SOURCE, self.store, "general"))
        elif self.generated:
            self.generated.show(ctx)
            sources.append((SOURCE, self.generated.indices, self.generated.store))
        total = sum(len(rows) for _, rows, _ in sources)
        added = []
        for name, rows, store in sources:
            part = len(rows) / total if self.sampling == "uniform" else 1 / len(sources)
            added.append(
                Stream(name, rows, store, self._mix * part, counts_as_task=not self.is_fixed)
            )
        return (*streams, *added)

    def on_task_start(self, ctx: Context) -> None:
        """Lets the starting model decode its rows, once; makes the cache that is needed from then on."""
        if self.source == "generated" and self.generated.made_at is None:
            self.generated.make(ctx, base=True)
        if self.der_alpha > 0 and self._mix > 0:
            self.cache.fill(ctx)

    def on_step_start(self, ctx: Context) -> None:
        """Begins the counts of the step."""
        self._rows, self._tokens, self._all_tokens = 0, 0.0, 0.0
        self._der.clear()
        self._der_tokens = 0

    def streams_changed(self, ctx: Context) -> bool:
        """Where there are rows by now that the streams in force do not know."""
        return self._asked != (self.generated.times, len(self.earlier))

    def edit_batch(self, ctx: Context, micro: Micro) -> Micro:
        """A replayed token counts as `der_beta` tokens of the task's one mean."""
        if self.der_beta == 1 or self.is_fixed or self._names().isdisjoint(micro.sources):
            return micro
        replayed = micro.source_mask_N(self._names())
        weights = torch.where(replayed, micro.weights_N * self.der_beta, micro.weights_N)
        return replace(micro, weights_N=weights)

    def before_backward(self, ctx: Context, micros: Sequence[Micro]) -> None:
        """Caches the distributions of rows that have come to be replayed."""
        if self.der_alpha > 0 and self._mix > 0:
            self.cache.fill(ctx)

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Replayed tokens where they have terms of their own. Keeps the counts that are reported."""
        if self._mix <= 0:
            return {}
        names = self._names()
        replayed = micro.source_mask_N(names)
        count = float(replayed.sum())
        self._rows += sum(source in names for source in micro.sources)
        self._tokens += count
        self._all_tokens += float((micro.is_task_B[micro.row_of_N] | replayed).sum())
        counts = {}
        if self.is_fixed:
            counts[CE_TOKENS] = float((micro.weights_N * replayed).sum())
        if self.der_alpha > 0:
            counts[DER_TOKENS] = count
        return counts

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """The replayed labels where they have a mean of their own, and the divergence of DER."""
        own_N = micro.source_mask_N(self._names())
        if self._mix <= 0 or not bool(own_N.any()):
            return ()
        terms = []
        if self.is_fixed:
            logits = out.logits_NV[own_N]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats = F.cross_entropy(wide, micro.targets_N[own_N], reduction="none")
            value = (nats * micro.weights_N[own_N]).sum()
            terms.append(Term("replay", value, CE_TOKENS, self.der_beta))
        if self.der_alpha > 0:
            terms.append(self._der_term(micro, out))
        return terms

    def on_task_end(self, ctx: Context) -> None:
        """Keeps a share of the finished domain's rows for later tasks, with what the model says on them."""
        is_last = ctx.task_index + 1 >= ctx.num_tasks
        if is_last or self.domain_store_fraction == 0 or ctx.domain_store in self.earlier:
            return
        available = ctx.num_training_rows
        wanted = math.ceil(self.domain_store_fraction * available)
        rows = _stretches(ctx, f"{self.kind}/{EARLIER}", wanted, available)
        self.earlier[ctx.domain_store] = rows
        if self.der_alpha > 0:
            self._stored[ctx.domain_store] = self._remember(ctx, rows)

    def metrics(self) -> Mapping[str, float]:
        """Of this rank's part of the step: replayed rows and tokens, and their share of the task's tokens.

        The row share is the mix ratio; the token share differs from it where lengths do. `der_nats` is the
        mean divergence from the stored distributions.
        """
        found = {
            "rows": float(self._rows),
            "tokens": self._tokens,
            "token_share": self._tokens / self._all_tokens if self._all_tokens else 0.0,
        }
        if self.der_alpha > 0:
            nats = float(torch.stack(self._der).double().sum()) if self._der else 0.0
            found["der_nats"] = nats / max(self._der_tokens, 1)
        return found

    def state_dict(self) -> StateDict:
        """What is stored and what was decoded; cursors belong to the sampler."""
        scalars: dict[str, Any] = {
            "store_rows": len(self.store),
            "store_sha256": self._digest(),
            "earlier": {store: list(rows) for store, rows in self.earlier.items()},
            **self.generated.scalars(),
        }
        tensors = self.generated.tensors()
        for store, known in self._stored.items():
            tensors |= {f"stored/{store}/{name}": value for name, value in known.tensors.items()}
        return {**super().state_dict(), "tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up decoded rows and earlier domains; checks that the store is the saved one.

        Raises:
            ValueError: It is not, something is missing, or the state is another strategy's.
        """
        super().load_state_dict(state)
        scalars, tensors = state["scalars"], state["tensors"]
        saved = (scalars["store_rows"], scalars["store_sha256"])
        if self.store and saved != (len(self.store), self._digest()):
            raise ValueError("state of replay: its store is not the one that this run draws")
        self.generated.load(tensors, scalars)
        self.earlier = {store: tuple(rows) for store, rows in scalars["earlier"].items()}
        self._stored = {}
        for store, rows in self.earlier.items() if self.der_alpha > 0 else ():
            prefix = f"stored/{store}/"
            own = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            if own.keys() != STORED or own["rows_S"].tolist() != list(rows):
                raise ValueError(f"state of replay: what was stored of {store} is not all there")
            self._stored[store] = Distributions(own)

    def _names(self) -> frozenset[str]:
        """The sources of the rows it adds."""
        return frozenset({SOURCE, *map(_earlier, self.earlier)})

    def _der_term(self, micro: Micro, out: Forward) -> Term:
        caches = self.cache.known | {_earlier(s): known for s, known in self._stored.items()}
        own_N = micro.source_mask_N(frozenset(caches))
        nats, _ = bucketed_kl_sum(
            out.logits_NV[own_N], look_up(caches, micro), temperature=self.der_temperature
        )
        self._der.append(nats.detach())
        self._der_tokens += int(own_N.sum())
        return Term("der", nats, DER_TOKENS, self.der_alpha)

    def _remember(self, ctx: Context, rows: Sequence[int]) -> Distributions:
        """What the model as it stands says on rows of the task that it has just learned."""
        forward = ctx.forward
        if forward is None:
            raise ValueError("replay: this run shows no logits")

        def predict(micro: Micro) -> Tensor:
            with torch.no_grad():
                logits: Tensor = forward(micro).logits_NV
            return logits

        with evaluating(ctx.model):
            made = make_distributions(
                ctx, ctx.domain_store, rows, predict, k=self.top_k, temperature=self.der_temperature
            )
        return Distributions(made)

    def _digest(self) -> str:
        return hashlib.sha256(",".join(map(str, self.store)).encode()).hexdigest()


def _earlier(store: str) -> str:
    """The source of a finished domain's rows: each domain's is its own, as row numbers are."""
    return f"{EARLIER}-{store.removeprefix('training').removeprefix('-') or 0}"


def _stretches(ctx: Context, kind: str, wanted: int, available: int) -> tuple[int, ...]:
    """One row from each of equal stretches of the file: files are often ordered by source."""
    count = min(wanted, available)
    uniform = torch.rand(count, generator=ctx.generator(kind), dtype=torch.float64)
    rows = []
    for index, share in enumerate(uniform.tolist()):
        start, end = index * available // count, (index + 1) * available // count
        rows.append(start + int(share * (end - start)))
    return tuple(rows)
