"""Counterfactual pairs and penalties for what differs between environments."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.domain.configs.base import ModelKind, StrategyBase
from app.domain.frozen import Frozen


class BackTranslation(Frozen):
    """Two registered sequence-to-sequence models: into another language, and back."""

    forward: str = Field(min_length=1, max_length=256)
    backward: str = Field(min_length=1, max_length=256)
    candidates: int = Field(default=4, ge=1, le=16)  # a row
    top_p: float = Field(default=0.9, gt=0, le=1)


class CausalConfig(StrategyBase):
    """Consistency over counterfactual pairs, V-REx, IRM and CORAL; `strength` scales all of them."""

    model_kinds: ClassVar[Mapping[str, ModelKind]] = MappingProxyType(
        {"back_translation.forward": "seq2seq", "back_translation.backward": "seq2seq"}
    )

    type: Literal["causal"] = "causal"
    consistency_coef: float = Field(default=0.1, ge=0, le=1e4)
    consistency: Literal["hidden", "answer_kl"] = "hidden"  # 1 - cos of pooled states, or nats
    pooling: Literal["mean", "last"] = "mean"  # of a row's states, to its last supervised position
    layer: float = Field(default=2 / 3, gt=0, le=1)  # share of the depth
    pairs: Literal["rules", "uploaded", "back_translation"] = "rules"
    rules: tuple[Literal["entities", "numbers", "register"], ...] = Field(
        default=("entities", "register"), min_length=1
    )
    entities: tuple[tuple[str, ...], ...] = Field(
        default=(), max_length=64
    )  # groups of words that may stand for one another, beside the built-in given names
    back_translation: BackTranslation | None = None
    cf_fraction: float = Field(default=0.25, gt=0, le=1)  # share of rows with their pair, a step
    embedding_cosine: tuple[float, float] | None = None  # of the pairs to keep, by the encoder
    environments: Literal["auto", "tags", "sources"] = "auto"
    vrex_beta: float = Field(default=1.0, ge=0, le=1e6)
    irm_lambda: float = Field(default=0.0, ge=0, le=1e6)
    coral_coef: float = Field(default=0.0, ge=0, le=1e6)
    coral_queue: int = Field(default=0, ge=0, le=4096)  # pooled states kept for each environment
    min_rows_per_env: int = Field(default=4, ge=1, le=1024)  # in a step, or it is left out of it
    general_ratio: float = Field(default=0.5, ge=0, le=4)  # general rows as a share of batch_size
    anneal: float = Field(default=0.15, ge=0, le=1)  # share of the task's steps to full strength

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.pairs == "back_translation") != (self.back_translation is not None):
            raise ValueError(
                "back_translation: names two models exactly when pairs is 'back_translation'"
            )
        low, high = self.embedding_cosine or (-1, 1)
        if not -1 <= low < high <= 1:
            raise ValueError("embedding_cosine: two numbers from -1 to 1, the lower one first")
        if not (self.consistency_coef or self.vrex_beta or self.irm_lambda or self.coral_coef):
            raise ValueError("consistency_coef: every term is 0; leave the strategy out instead")
        for group in self.entities:
            if len(group) < 2 or not all(word.strip() for word in group):
                raise ValueError("entities: a group is two or more words")
        return self

    def named_models(self) -> tuple[tuple[str, str], ...]:
        """The two translators."""
        models = self.back_translation
        if models is None:
            return ()
        return (
            ("back_translation.forward", models.forward),
            ("back_translation.backward", models.backward),
        )
