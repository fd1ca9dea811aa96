"""Consistency over counterfactual pairs, and penalties for what differs between environments."""

# Shape letters: B rows, N positions, V vocabulary, D width, E environments, P pairs.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.base import Cost, Needs, StateDict, Strategy
from workers.strategies.batch import Forward, Micro, Stream, Term
from workers.strategies.context import Context
from workers.strategies.environments import CORAL_ROWS, Read, StepRisks
from workers.strategies.invariance import consistency, match_pairs, pool, uniform_of
from workers.strategies.penalties import divergence_sum

DOMAIN, GENERAL, COUNTERFACTUAL = "domain", "general", "counterfactual"
PAIRS = "causal_pairs"  # pairs of the step, or their aligned answer positions
TOKENS = "causal_tokens"  # loss weight of the environments in use


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """The configuration's fields; see `app.domain.configs.causal`."""

    consistency_coef: float = 0.1
    consistency: Literal["hidden", "answer_kl"] = "hidden"
    pooling: Literal["mean", "last"] = "mean"
    layer: float = 2 / 3
    pairs: str = "rules"
    rules: Sequence[str] = ()  # this and the next two: read where pairs are made
    entities: Sequence[Sequence[str]] = ()
    back_translation: Any = None
    cf_fraction: float = 0.25
    embedding_cosine: tuple[float, float] | None = None
    environments: Literal["auto", "tags", "sources"] = "auto"
    vrex_beta: float = 1.0
    irm_lambda: float = 0.0
    coral_coef: float = 0.0
    coral_queue: int = 0
    min_rows_per_env: int = 4
    general_ratio: float = 0.5
    anneal: float = 0.15

    @property
    def betas(self) -> dict[str, float]:
        """Coefficients of the penalties that compare environments."""
        return {"vrex": self.vrex_beta, "irm": self.irm_lambda, "coral": self.coral_coef}

    @property
    def compares_environments(self) -> bool:
        """Whether any penalty but consistency is on."""
        return any(beta > 0 for beta in self.betas.values())


class Causal(Strategy):
    """Pulls a row's representation toward that of its counterpart, and the environments' risks together.

    The strength scales all of it. Keywords are those of `Knobs`.
    """

    kind: ClassVar[str] = "causal"

    def __init__(self, **knobs: Any) -> None:  # noqa: ANN401 - checked by the dataclass
        self.knobs = Knobs(**knobs)
        self._names: tuple[str, ...] = ()  # of the environments
        self._digest = ""
        self._near: frozenset[int] | None = None  # rows whose pair the encoder lets pass; None: all
        self._near_of = ""  # the digest of those pairs
        self._active_steps = 0
        self._scale = 0.0  # strength times ramp
        self._risks: StepRisks | None = None
        self._queues: dict[int, Tensor] = {}
        self._num_pairs = 0
        self._pulled: list[Tensor] = []  # sum of 1 - cos, and the squared norm of its gradient

    def needs(self) -> Needs:
        """Hidden states where representations are compared."""
        k = self.knobs
        hidden = (k.consistency_coef > 0 and k.consistency == "hidden") or k.coral_coef > 0
        return Needs(forward=frozenset({"hidden_states"} if hidden else ()))

    def step_needs(self, ctx: Context) -> Needs:
        """The layer at `layer` of the depth."""
        if ctx.strength(self.kind) <= 0 or not self.needs().forward:
            return Needs()
        return Needs(forward=self.needs().forward, hidden_layers=frozenset({self._layer(ctx)}))

    def cost(self) -> Cost:
        """A pair is a row more; general rows likewise; risks known beforehand are a forward of the step."""
        k = self.knobs
        pairs = k.cf_fraction if k.consistency_coef > 0 else 0.0
        compared = (k.general_ratio + (1 + k.general_ratio) / 3) if k.compares_environments else 0.0
        return Cost(step_share=pairs + compared)

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds general rows, outside the task's cross-entropy, where the domain rows are one environment.

        Raises:
            ValueError: What is asked for can't be done with the rows there are.
        """
        pairs = ctx.pairs.get(_store(ctx))
        self._digest = "" if pairs is None else pairs.digest
        self._names = self._environment_names(ctx)
        if ctx.strength(self.kind) <= 0 or not self.knobs.compares_environments:
            return streams
        ratio = self.knobs.general_ratio
        if self._uses_tags(ctx) or ratio == 0 or any(s.name == GENERAL for s in streams):
            return streams
        if not ctx.num_general_rows:
            raise ValueError(
                "causal: there is one environment alone; give training rows at least two values of `domain`, "
                "or general data, or set vrex_beta, irm_lambda and coral_coef to 0"
            )
        rows = tuple(range(ctx.num_general_rows))
        return (*streams, Stream(GENERAL, rows, GENERAL, ratio, counts_as_task=False))

    def on_task_start(self, ctx: Context) -> None:
        """Refuses what could never act.

        Raises:
            ValueError: No row has a counterpart, or a step has too few rows of an environment.
        """
        k = self.knobs
        self._queues = {}  # another task's environments
        pairs = ctx.pairs.get(_store(ctx))
        if k.consistency_coef > 0 and (pairs is None or max(pairs.row_of, default=-1) < 0):
            raise ValueError(
                f"causal: no training row has a counterpart (pairs: {k.pairs}); rows of plain text have none. "
                "Set consistency_coef to 0, or choose other pairs"
            )
        if not k.compares_environments:
            return
        tags = len(self._environment_names(ctx)) if self._uses_tags(ctx) else 0
        smallest = ctx.batch_size * (1 / tags if tags else min(1.0, k.general_ratio or 1.0))
        if not tags and smallest < k.min_rows_per_env:
            raise ValueError(
                f"causal: {smallest:g} general rows a step are fewer than min_rows_per_env "
                f"({k.min_rows_per_env}); raise general_ratio or the batch size"
            )
        if k.coral_coef > 0 and max(smallest, k.coral_queue) < CORAL_ROWS:
            raise ValueError(
                f"causal: CORAL needs {CORAL_ROWS} rows of each environment and a step has {smallest:g}; set "
                f"coral_queue to {CORAL_ROWS} or more"
            )

    def on_step_start(self, ctx: Context) -> None:
        """The ramp, and empty sums."""
        strength = ctx.strength(self.kind)
        steps = self.knobs.anneal * ctx.task_steps
        ramp = min(1.0, (self._active_steps + 1) / steps) if steps > 0 else 1.0
        self._scale = strength * ramp
        self._risks = None
        self._num_pairs, self._pulled = 0, []
        if strength > 0 and self.knobs.consistency_coef > 0:
            self._look_at_pairs(ctx)

    def edit_batch(self, ctx: Context, micro: Micro) -> Micro:
        """Puts the counterparts of a share of the domain rows behind the rows."""
        pairs = ctx.pairs.get(_store(ctx))
        k = self.knobs
        if ctx.strength(self.kind) <= 0 or k.consistency_coef == 0 or pairs is None:
            return micro
        if ctx.rows_micro is None:
            raise ValueError("causal: the run gives no rows of a store")
        chosen = [
            pairs.row_of[row]
            for source, row in zip(micro.sources, micro.sample_ids, strict=True)
            if source == DOMAIN
            and self._has_pair(ctx, row)
            and uniform_of(ctx.run_seed, ctx.step, row) < k.cf_fraction
        ]
        if not chosen:
            return micro
        return micro.join(ctx.rows_micro(COUNTERFACTUAL, pairs.store, chosen))

    def before_backward(self, ctx: Context, micros: Sequence[Micro]) -> None:
        """Learns the environments' risks over the whole step, so that its terms can be sums.

        The forward without gradient is left out where the step is a single micro-batch. It draws the same
        dropout as the one with gradient will.
        """
        if ctx.strength(self.kind) <= 0 or not self.knobs.compares_environments:
            return
        k = self.knobs
        self._risks = StepRisks(len(self._names), k.betas, k.min_rows_per_env, ctx.device)
        for micro in micros:
            self._risks.add(micro, self._environment_of(ctx, micro))
        self._risks.close(ctx.all_reduce)
        if ctx.world_size == 1 and len(micros) == 1:
            return
        if ctx.forward is None:
            raise ValueError("causal: the run gives no forward")
        layers = frozenset({self._layer(ctx)} if k.coral_coef > 0 else ())
        cuda = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            reads = [self._read(ctx, micro, ctx.forward(micro, layers)) for micro in micros]
        self._risks.know(reads, self._queues, ctx.all_reduce, (ctx.rank, ctx.world_size))

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Pairs (or their answer positions), and the weight of the environments in use."""
        if ctx.strength(self.kind) <= 0:
            return {}
        counts = {}
        if self.knobs.consistency_coef > 0:
            counts[PAIRS] = float(len(self._aligned(ctx, micro)[0]))
            self._num_pairs += int(counts[PAIRS])
        if self._risks is not None and self._risks.holds(micro):
            counts[TOKENS] = self._risks.count(micro)
        return counts

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """Consistency, and the linearised penalties of the environments."""
        if self._scale <= 0:
            return ()
        terms = self._consistency_terms(ctx, micro, out)
        if self._risks is None:
            return terms
        if not self._risks.holds(micro):
            raise ValueError("causal: a micro-batch of the step was not shown beforehand")
        read = self._read(ctx, micro, out)
        if not self._risks.is_known:
            self._risks.know([read], self._queues, ctx.all_reduce, (ctx.rank, ctx.world_size))
        for name, numerator in self._risks.numerators(read).items():
            coef = self._scale * self.knobs.betas[name]
            terms.append(Term(f"causal_{name}", numerator, TOKENS, coef))
        return terms

    def on_step_end(self, ctx: Context) -> None:
        """Counts the step, and queues its pooled states."""
        if ctx.strength(self.kind) <= 0:
            return
        self._active_steps += 1
        for environment, states in (self._risks.fresh if self._risks else {}).items():
            kept = [self._queues[environment]] if environment in self._queues else []
            queued = torch.cat([*kept, states.float()])  # as it is saved
            self._queues[environment] = queued[max(len(queued) - self.knobs.coral_queue, 0) :]

    def metrics(self) -> Mapping[str, float]:
        """Of the last step; consistency and pairs of this rank's part.

        `consistency` is the mean of 1 - cos (or of the symmetric KL), `vrex` the variance of the risks,
        `risk_gap` the largest less the smallest, `irm` and `coral` their penalties before coefficients.
        `applied_norm` is the norm of the whole penalty's gradient with respect to what it is a function of:
        pooled states, logits of answers, risks.
        """
        pairs, risks = self._num_pairs, self._risks
        value, squared = 0.0, 0.0
        if self._pulled:
            value, squared = torch.stack(self._pulled).double().sum(0).tolist()
        pull = self.knobs.consistency_coef * squared**0.5 / max(pairs, 1)
        known = {} if risks is None else risks.values
        rest = 0.0 if risks is None else risks.squared_norm
        return {
            "applied_norm": self._scale * (pull**2 + rest) ** 0.5,
            "pairs": float(pairs),
            "consistency": value / max(pairs, 1),
            "environments": 0.0 if risks is None else float(risks.used_E.sum()),
            **{n: known.get(n, 0.0) for n in ("vrex", "irm", "coral", "risk_gap")},
            "scale": self._scale,
        }

    def state_dict(self) -> StateDict:
        """The ramp's counter, the queues, and which pairs the run reads."""
        tensors = {f"queue/{e}": states for e, states in self._queues.items()}
        scalars = {"active_steps": self._active_steps, "pairs": self._digest}
        return {**super().state_dict(), "tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes them up.

        Raises:
            ValueError: The run reads other pairs, or the state is another strategy's.
        """
        super().load_state_dict(state)
        saved = state["scalars"]
        if saved["pairs"] != self._digest:
            raise ValueError("state of causal: its pairs are not those that this run reads")
        self._active_steps = int(saved["active_steps"])
        self._queues = {int(k.removeprefix("queue/")): v for k, v in state["tensors"].items()}

    def _layer(self, ctx: Context) -> int:
        return max(1, round(self.knobs.layer * ctx.num_layers))

    def _uses_tags(self, ctx: Context) -> bool:
        if self.knobs.environments == "sources":
            return False
        several = len(set(ctx.environments.get(_store(ctx), ()))) > 1
        if self.knobs.environments == "tags" and not several:
            raise ValueError("causal: environments are tags, and training rows name fewer than two")
        return several

    def _environment_names(self, ctx: Context) -> tuple[str, ...]:
        if not self._uses_tags(ctx):
            return (DOMAIN, GENERAL)
        own = {name or DOMAIN for name in ctx.environments[_store(ctx)]}
        return tuple(
            sorted(
                own | {name or GENERAL for name in ctx.environments.get(GENERAL, ())} | {GENERAL}
            )
        )

    def _environment_of(self, ctx: Context, micro: Micro) -> Tensor:
        """The environment of each row; -1 for counterparts and rows of other strategies."""
        tags = ctx.environments if self._uses_tags(ctx) else {}
        place = {name: index for index, name in enumerate(self._names)}

        def name_of(source: str, row: int) -> str | None:
            if source == DOMAIN:
                return tags[_store(ctx)][row] or DOMAIN if tags else DOMAIN
            if source == GENERAL:
                return tags[GENERAL][row] or GENERAL if GENERAL in tags else GENERAL
            return GENERAL if source == "replay" else None

        found = [
            place.get(name_of(source, row) or "", -1)
            for source, row in zip(micro.sources, micro.sample_ids, strict=True)
        ]
        return torch.tensor(found, dtype=torch.int64, device=ctx.device)

    def _has_pair(self, ctx: Context, row: int) -> bool:
        return ctx.pairs[_store(ctx)].row_of[row] >= 0 and (self._near is None or row in self._near)

    def _look_at_pairs(self, ctx: Context) -> None:
        """Which rows have a counterpart within the bounds of the encoder's cosine; every rank asks at once."""
        bounds, pairs = self.knobs.embedding_cosine, ctx.pairs.get(_store(ctx))
        if bounds is None or pairs is None or self._near_of == pairs.digest:
            return
        if ctx.embed is None:
            raise ValueError("causal: embedding_cosine is set and the run has no encoder")
        rows = [row for row, other in enumerate(pairs.row_of) if other >= 0]
        left = ctx.embed(_store(ctx), rows)
        right = ctx.embed(pairs.store, [pairs.row_of[row] for row in rows])
        cosines = (left * right).sum(-1).tolist()
        near = frozenset(
            r for r, c in zip(rows, cosines, strict=True) if bounds[0] <= c <= bounds[1]
        )
        self._near, self._near_of = near, pairs.digest
        ctx.note(
            "causal_pairs_embedded",
            f"causal: {len(near)} of {len(rows)} pairs lie within {bounds[0]:g} to {bounds[1]:g} of the "
            "encoder's cosine.",
            {"kept": len(near), "pairs": len(rows)},
        )

    def _aligned(self, ctx: Context, micro: Micro) -> tuple[list[int], list[int]]:
        """What is compared: rows, or with `answer_kl` the positions of their answers, which are the same tokens."""
        if COUNTERFACTUAL not in micro.sources:
            return [], []
        rows = match_pairs(micro, ctx.pairs[_store(ctx)].row_of, DOMAIN, COUNTERFACTUAL)
        if self.knobs.consistency == "hidden":
            return rows
        found: list[list[int]] = [[], []]
        for places, side in zip(found, rows, strict=True):
            for row in side:
                places.extend(torch.nonzero(micro.row_of_N == row).flatten().tolist())
        return found[0], found[1]

    def _consistency_terms(self, ctx: Context, micro: Micro, out: Forward) -> list[Term]:
        coef = self._scale * self.knobs.consistency_coef
        left, right = self._aligned(ctx, micro) if coef > 0 else ([], [])
        if not left:
            return []
        if self.knobs.consistency == "hidden":
            is_last = self.knobs.pooling == "last"
            states_BD = pool(micro, out.hidden_BTD[self._layer(ctx)], last=is_last)
            value, squared = consistency(states_BD[left], states_BD[right])
        else:
            value, squared = _symmetric_kl(out.logits_NV[left], out.logits_NV[right])
        self._pulled.append(torch.stack([value.detach(), squared.detach()]))
        return [Term("causal_consistency", value, PAIRS, coef)]

    def _read(self, ctx: Context, micro: Micro, out: Forward) -> Read:
        if self.knobs.coral_coef == 0:
            return Read(micro, out.logits_NV, None)
        is_last = self.knobs.pooling == "last"
        states_BD = pool(micro, out.hidden_BTD[self._layer(ctx)], last=is_last)
        return Read(micro, out.logits_NV, states_BD)


def _store(ctx: Context) -> str:
    """The store of the task's rows."""
    return f"training-{ctx.task_index}" if ctx.task_index else "training"


def _symmetric_kl(left_NV: Tensor, right_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions of 1/2 [KL(sg right || left) + KL(sg left || right)], and its gradient's squared norm."""
    onto_left, left_sq = divergence_sum(left_NV, right_NV.detach())
    onto_right, right_sq = divergence_sum(right_NV, left_NV.detach())
    return 0.5 * (onto_left + onto_right), 0.25 * (left_sq + right_sq)
