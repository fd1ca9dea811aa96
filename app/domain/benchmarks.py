"""Benchmarks: what an item looks like, how items are split, and how per-item scores travel."""

import base64
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from app.domain.frozen import Frozen

Scores = NDArray[np.float32]

MAX_SUBJECT: Final = 256  # characters
MAX_SUBJECTS: Final = 1000  # of a benchmark; more give no breakdown


class BenchmarkKind(StrEnum):
    """What a benchmark is watched for."""

    GENERAL = "general"  # must not drop
    DOMAIN = "domain"  # the thing being learned


class Scorer(StrEnum):
    """How an item is scored; higher is better but for `nll`."""

    MULTIPLE_CHOICE = (
        "multiple_choice"  # 1 when the right choice has the highest log-likelihood, else 0
    )
    EXACT_MATCH = "exact_match"  # 1 when the generated answer equals an accepted one; letter case and white space don't count
    NORMALISED_MATCH = (
        "normalised_match"  # the same without punctuation and English articles: SQuAD's exact match
    )
    TOKEN_F1 = "token_f1"  # noqa: S105 - SQuAD's F1 of words, of the best accepted answer
    BLEU4 = "bleu4"  # sacrebleu's sentence BLEU over 100, all accepted answers as references
    ROUGE_L = "rouge_l"  # rouge-score's ROUGE-L F-measure, of the best accepted answer
    NLL = "nll"  # nats summed over the text's tokens; travels with its token count


#: Scorers of generated answers; their files are written alike.
GENERATION: Final = frozenset(
    {
        Scorer.EXACT_MATCH,
        Scorer.NORMALISED_MATCH,
        Scorer.TOKEN_F1,
        Scorer.BLEU4,
        Scorer.ROUGE_L,
    }
)

#: Modules that a scorer needs, and what installs them.
SCORER_MODULES: Final[dict[Scorer, tuple[str, str]]] = {
    Scorer.BLEU4: ("sacrebleu", "sacrebleu"),
    Scorer.ROUGE_L: ("rouge_score", "rouge-score"),
}


class MultipleChoiceItem(Frozen):
    """One line of a `multiple_choice` file; `answer` counts from 0."""

    id: str = Field(min_length=1, max_length=256)
    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2, max_length=64)
    answer: int = Field(ge=0)
    subject: str | None = Field(default=None, max_length=MAX_SUBJECT)

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "MultipleChoiceItem":
        if self.answer >= len(self.choices):
            raise ValueError(
                f"answer: {self.answer} is not the index of one of the {len(self.choices)} choices"
            )
        return self


class ExactMatchItem(Frozen):
    """One line of a file of questions whose answers are generated; any of `answers` (else `answer`) counts."""

    id: str = Field(min_length=1, max_length=256)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    answers: tuple[str, ...] | None = None
    subject: str | None = Field(default=None, max_length=MAX_SUBJECT)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)


class NllItem(Frozen):
    """One line of an `nll` file: a text, or the assistant turns of a chat."""

    id: str = Field(min_length=1, max_length=256)
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    subject: str | None = Field(default=None, max_length=MAX_SUBJECT)

    @model_validator(mode="after")
    def _one_of_both(self) -> "NllItem":
        if (self.text is None) == (self.messages is None):
            raise ValueError("text: give either text or messages")
        return self


ITEM_TYPES: dict[Scorer, type[MultipleChoiceItem] | type[ExactMatchItem] | type[NllItem]] = {
    Scorer.MULTIPLE_CHOICE: MultipleChoiceItem,
    Scorer.NLL: NllItem,
    **{scorer: ExactMatchItem for scorer in GENERATION},  # noqa: C420 - as `fromkeys` mypy loses the type
}


def item_id(item: Mapping[str, Any]) -> str:
    """The id of a line's object: its own, else 32 hex digits of its contents' SHA-256, so that equal items share it."""
    if "id" in item:
        return str(item["id"])
    text = json.dumps(item, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Subjects(Frozen):
    """Which subject each item of a version is of; `codes` is a packed array of places in `names`, -1 for none."""

    names: tuple[str, ...]
    codes: str

    def counts(self) -> dict[str, int]:
        """Number of items by subject."""
        found = Counter(unpack_array(self.codes).astype(int).tolist())
        return {name: found[place] for place, name in enumerate(self.names)}


def collect_subjects(subjects: Sequence[str | None]) -> Subjects | None:
    """Subjects of a file's items in file order; None where there are none, or too many to break down by."""
    names = sorted({subject for subject in subjects if subject is not None})
    if not names or len(names) > MAX_SUBJECTS:
        return None
    places = {name: place for place, name in enumerate(names)}
    codes = [-1 if subject is None else places[subject] for subject in subjects]
    return Subjects(names=tuple(names), codes=pack_array(np.asarray(codes, np.float32)))


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
