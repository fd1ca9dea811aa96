"""Benchmarks: what an item looks like, how items are split, and how per-item scores travel."""

import base64
import hashlib
import zlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from app.domain.frozen import Frozen

Scores = NDArray[np.float32]


class BenchmarkKind(StrEnum):
    """What a benchmark is watched for."""

    GENERAL = "general"  # must not drop
    DOMAIN = "domain"  # the thing being learned


class Scorer(StrEnum):
    """How an item is scored; higher is better but for `nll`."""

    MULTIPLE_CHOICE = (
        "multiple_choice"  # 1 when the right choice has the highest log-likelihood, else 0
    )
    EXACT_MATCH = (
        "exact_match"  # 1 when the generated answer equals an accepted one after normalisation
    )
    NLL = "nll"  # nats summed over the text's tokens; travels with its token count


class MultipleChoiceItem(Frozen):
    """One line of a `multiple_choice` file; `answer` counts from 0."""

    id: str = Field(min_length=1, max_length=256)
    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2, max_length=64)
    answer: int = Field(ge=0)
    subject: str | None = None

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "MultipleChoiceItem":
        if self.answer >= len(self.choices):
            raise ValueError(
                f"answer: {self.answer} is not the index of one of the {len(self.choices)} choices"
            )
        return self


class ExactMatchItem(Frozen):
    """One line of an `exact_match` file; any of `answers` (else `answer`) counts."""

    id: str = Field(min_length=1, max_length=256)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    answers: tuple[str, ...] | None = None
    subject: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=4096)


class NllItem(Frozen):
    """One line of an `nll` file: a text, or the assistant turns of a chat."""

    id: str = Field(min_length=1, max_length=256)
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    subject: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "NllItem":
        if (self.text is None) == (self.messages is None):
            raise ValueError("text: give either text or messages")
        return self


ITEM_TYPES: dict[Scorer, type[MultipleChoiceItem] | type[ExactMatchItem] | type[NllItem]] = {
    Scorer.MULTIPLE_CHOICE: MultipleChoiceItem,
    Scorer.EXACT_MATCH: ExactMatchItem,
    Scorer.NLL: NllItem,
}

ItemSet = Literal["gate", "report", "all"]
DEFAULT_GATE_ITEMS = 1000


def split_items(
    item_ids: Sequence[str], gate_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the gate items, which steer, and of the report items, which give the final verdict.

    An item's half depends on its id alone, so the halves stay disjoint whatever `gate_items` is; within
    its half the gate takes the first `gate_items` in hash order.
    """
    hashes = [hashlib.sha256(item_id.encode()).digest() for item_id in item_ids]
    gate = sorted((i for i, h in enumerate(hashes) if h[0] % 2 == 0), key=lambda i: hashes[i][1:])
    report = [i for i, h in enumerate(hashes) if h[0] % 2 == 1]
    return np.asarray(sorted(gate[:gate_items]), dtype=np.int64), np.asarray(report, dtype=np.int64)


def pack_array(values: Scores) -> str:
    """Float32 array as zlib-compressed base64 text."""
    return base64.b64encode(zlib.compress(values.astype("<f4").tobytes())).decode()


def unpack_array(text: str) -> Scores:
    """The array that `pack_array` packed."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4").astype(np.float32)


class BenchmarkScores(Frozen):
    """Per-item scores of one subject on one benchmark version, aligned with the version's item order.

    `scores` and `tokens` are packed float32 arrays of the version's full length; NaN where an item was not
    to be scored, infinite where the model gave no finite number. `tokens` holds token counts and is there for `nll` alone.
    """

    benchmark_version_id: str
    item_set: ItemSet
    scores: str
    tokens: str | None = None
