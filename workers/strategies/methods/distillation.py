"""Distillation of logits from the model the run started from."""

from collections.abc import Mapping, Sequence
from typing import Literal

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
from workers.strategies.penalties import Divergence, divergence

TOKENS = "distillation_tokens"
Source = Literal["domain", "general", "replay"]


class Distillation(Strategy):
    """strength * mean divergence from the starting model over the tokens of the chosen streams.

    Args:
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: Of both distributions; the loss is rescaled by its square.
        beta: Of `jsd`.
        jsd_rescale: Divide `jsd` by beta (1 - beta).
        on: Streams whose rows are distilled; `auto` is general rows, and replayed ones where there are any.
        general_ratio: General rows added to each step as a share of the batch size.
    """

    kind = "distillation"

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        beta: float = 0.5,
        jsd_rescale: bool = True,
        on: Sequence[Source] | Literal["auto"] = "auto",
        general_ratio: float = 0.25,
    ) -> None:
        self._divergence = divergence
        self._temperature = temperature
        self._beta = beta
        self._rescale = jsd_rescale
        self._sources: frozenset[str] = frozenset(("general", "replay") if on == "auto" else on)
        self._general_ratio = general_ratio
        self._value: Tensor | None = None
        self._count: Tensor | None = None
        self._strength = 0.0

    def needs(self) -> Needs:
        """The teacher on the rows of its sources."""
        return Needs(
            forward=frozenset({"teacher_logits"}),
            teacher_sources=self._sources,
            general_rows=self._sources != {"domain"},
            base_unmodified=True,
        )

    def cost(self) -> Cost:
        """The added rows, and a third of a step of teacher forward on what is distilled."""
        share = self._general_ratio * 4 / 3 if "general" in self._sources else 0.0
        return Cost(
            step_share=share + (1 / 3 if "domain" in self._sources else 0.0), model_copies=1.0
        )

    def edit_streams(self, ctx: Context, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """Adds general rows that enter no cross-entropy.

        Raises:
            ValueError: There are no general rows.
        """
        if ctx.strength(self.kind) == 0 or "general" not in self._sources:
            return streams
        if ctx.num_general_rows == 0:
            raise ValueError("distillation needs general rows, and none are left after the checks")
        rows = tuple(range(ctx.num_general_rows))
        return (
            *streams,
            Stream("general", rows, "general", self._general_ratio, counts_as_task=False),
        )

    def on_step_start(self, ctx: Context) -> None:
        """Empties the meters."""
        self._value = self._count = None
        self._strength = ctx.strength(self.kind)

    def count_terms(self, ctx: Context, micro: Micro) -> Mapping[str, float]:
        """Distilled tokens of the micro-batch."""
        if ctx.strength(self.kind) == 0:
            return {}
        return {TOKENS: float(micro.source_mask_N(self._sources).sum())}

    def loss_terms(self, ctx: Context, micro: Micro, out: Forward) -> Sequence[Term]:
        """The divergence, summed over the micro-batch's distilled tokens."""
        strength = ctx.strength(self.kind)
        if strength == 0 or out.teacher_logits_NV is None or out.teacher_mask_N is None:
            return ()
        own_N = micro.source_mask_N(self._sources)
        if not bool(own_N.any()):
            return ()
        value = divergence(
            out.logits_NV[own_N],
            out.teacher_logits_NV[own_N[out.teacher_mask_N]],
            kind=self._divergence,
            temperature=self._temperature,
            beta=self._beta,
            rescale=self._rescale,
        )
        detached, count = value.detach(), own_N.sum()
        self._value = detached if self._value is None else self._value + detached
        self._count = count if self._count is None else self._count + count
        return (Term(self.kind, value, TOKENS, strength),)

    def metrics(self) -> Mapping[str, float]:
        """Mean divergence in nats per token on this rank, and its weight in the loss."""
        if self._value is None or self._count is None:
            return {"applied_norm": 0.0}
        mean = float(self._value / torch.clamp(self._count, min=1))
        return {"divergence": mean, "applied_norm": self._strength * abs(mean)}
