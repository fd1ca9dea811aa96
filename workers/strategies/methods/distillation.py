"""Distillation of logits from the model the job started from."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from workers.strategies.base import (
    Context,
    Cost,
    Forward,
    Micro,
    Needs,
    Strategy,
    Stream,
    Term,
)
from workers.strategies.penalties import Divergence, divergence_sum

KD_TOKENS = "kd_tokens"  # its own denominator: supervised positions of the distilled rows
GENERAL = "general"


class Distillation(Strategy):
    """Keeps the output distribution near that of the starting model, on chosen rows.

    Args:
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: Softens both distributions.
        beta: Weight of the teacher in `jsd`.
        jsd_rescale: Whether `jsd` is divided by beta (1 - beta).
        on: Sources whose rows are distilled; `auto` is replay (where there is any) and general rows.
        general_ratio: General rows added to each step, as a share of `batch_size`.
    """

    kind: ClassVar[str] = "distillation"

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        beta: float = 0.5,
        jsd_rescale: bool = True,
        on: Sequence[str] | Literal["auto"] = "auto",
        general_ratio: float = 0.25,
    ) -> None:
        self.divergence: Divergence = divergence
        self.temperature = temperature
        self.beta = beta
        self.jsd_rescale = jsd_rescale
        # A source without a stream has no rows, so `auto` may name replay whether or not it is on.
        self.sources = frozenset(("replay", GENERAL) if on == "auto" else on)
        self.general_ratio = general_ratio
        self._coef = 0.0
        self._tokens = 0
        self._nats: list[Tensor] = []
        self._squared_norms: list[Tensor] = []

    def needs(self) -> Needs:
        """The teacher's logits on its sources."""
        return Needs(
            forward=frozenset({"teacher_logits"}),
            teacher_sources=self.sources,
            general_rows=self.sources != {"domain"},
            base_unmodified=True,
        )

    def cost(self) -> Cost:
        """A teacher forward is a third of a step; general rows are read by student and teacher."""
        added = self.general_ratio * (4 / 3) if GENERAL in self.sources else 0.0
        domain = 1 / 3 if "domain" in self.sources else 0.0
        return Cost(step_share=added + domain, model_copies=1.0)

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds `general` rows, outside the task's cross-entropy, while it is turned on.

        Raises:
            ValueError: General rows are to be distilled and there are none.
        """
        if ctx.strength(self.kind) <= 0 or GENERAL not in self.sources:
            return streams
        if any(stream.name == GENERAL for stream in streams):
            return streams
        if not ctx.num_general_rows:
            raise ValueError("distillation: there are no general rows to distil on")
        rows = tuple(range(ctx.num_general_rows))
        stream = Stream(GENERAL, rows, "general", self.general_ratio, counts_as_task=False)
        return (*streams, stream)

    def on_step_start(self, ctx: Context) -> None:
        """Begins the sums of the step."""
        self._coef = ctx.strength(self.kind)
        self._tokens = 0
        self._nats.clear()
        self._squared_norms.clear()

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Supervised positions of the rows that are distilled."""
        if ctx.strength(self.kind) <= 0:
            return {}
        return {KD_TOKENS: float(micro.source_mask_N(self.sources).sum())}

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """The divergence, summed over the micro-batch's distilled positions.

        Raises:
            ValueError: The teacher has not read them.
        """
        coef = ctx.strength(self.kind)
        if coef <= 0 or self.sources.isdisjoint(micro.sources):
            return ()
        own_N = micro.source_mask_N(self.sources)
        count = int(own_N.sum())
        if count == 0:
            return ()
        if out.teacher_logits_NV is None or out.teacher_mask_N is None:
            raise ValueError("distillation: the forward came without the teacher's logits")
        taught = own_N[out.teacher_mask_N]  # the teacher may have read other rows for others
        if int(taught.sum()) != count:
            raise ValueError("distillation: the teacher has not read all of its rows")
        nats, squared_norm = divergence_sum(
            out.logits_NV[own_N],
            out.teacher_logits_NV[taught],
            divergence=self.divergence,
            temperature=self.temperature,
            beta=self.beta,
            rescale=self.jsd_rescale,
        )
        self._tokens += count
        self._nats.append(nats.detach())
        self._squared_norms.append(squared_norm)
        return (Term("distillation", nats, KD_TOKENS, coef),)

    def metrics(self) -> Mapping[str, float]:
        """Of this rank's part of the step.

        `kd_nats` is the mean divergence of a token, `penalty` that times the strength, and
        `applied_norm` the norm of the penalty's gradient with respect to the student's logits.
        """
        if not self._tokens:
            return {"applied_norm": 0.0, "penalty": 0.0, "kd_nats": 0.0, "kd_tokens": 0.0}
        nats = float(torch.stack(self._nats).double().sum()) / self._tokens
        norm = float(torch.stack(self._squared_norms).double().sum()) ** 0.5
        return {
            "applied_norm": self._coef * norm / self._tokens,
            "penalty": self._coef * nats,
            "kd_nats": nats,
            "kd_tokens": float(self._tokens),
        }
