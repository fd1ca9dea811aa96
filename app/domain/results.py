"""Benchmark results that come from outside: `POST /v1/benchmark_results`."""

from datetime import datetime
from typing import Final, Literal

from pydantic import Field, model_validator

from app.domain.benchmarks import Scorer
from app.domain.frozen import Frozen

MAX_RESULTS: Final = 1000  # of one request
UNNAMED: Final = "value"  # the metric of a result that names none: the benchmark's own
#: Names by which a scorer's mean is posted; results under another metric are recorded and never acted on.
METRICS: dict[Scorer, frozenset[str]] = {
    Scorer.MULTIPLE_CHOICE: frozenset({"multiple_choice", "accuracy", "acc"}),
    Scorer.EXACT_MATCH: frozenset({"exact_match", "accuracy", "acc"}),
    Scorer.NORMALISED_MATCH: frozenset({"normalised_match", "em", "accuracy", "acc"}),
    Scorer.TOKEN_F1: frozenset({"token_f1", "f1"}),
    Scorer.BLEU4: frozenset({"bleu4", "bleu"}),
    Scorer.ROUGE_L: frozenset({"rouge_l", "rougeL"}),
    Scorer.NLL: frozenset({"nll"}),
}


class ResultSubject(Frozen):
    """What was measured."""

    type: Literal["fine_tuning.job", "model"]
    id: str = Field(min_length=1, max_length=512)


class ResultItem(Frozen):
    """The score of one item; of `nll` the nats summed over its text."""

    id: str = Field(min_length=1, max_length=256)
    score: float


class PostedResult(Frozen):
    """One benchmark of one subject; without `items` the comparison with the baseline is unpaired."""

    subject: ResultSubject
    benchmark: str = Field(min_length=1, max_length=256)  # `name` or `name@3`
    metric: str | None = Field(
        default=None, min_length=1, max_length=64
    )  # None: the benchmark's own
    value: float | None = None  # None: the mean of the items; of `nll` nats per token
    stderr: float | None = Field(default=None, ge=0)
    n_samples: int | None = Field(
        default=None, ge=1
    )  # without it and without items: never acted on
    items: tuple[ResultItem, ...] | None = Field(default=None, min_length=1, max_length=1_000_000)
    step: int | None = Field(default=None, ge=0)
    suite_sha256: str | None = Field(
        default=None, min_length=64, max_length=64
    )  # of the benchmark's file
    measured_at: datetime | None = None  # with an offset; None: just now
    source: str | None = Field(
        default=None, min_length=1, max_length=128
    )  # who measured; a monitor acts on the sources it lists. None: the name of the key

    @model_validator(mode="after")
    def _has_a_value(self) -> "PostedResult":
        if self.value is None and self.items is None:
            raise ValueError("value: give a value, or items")
        if self.measured_at is not None and self.measured_at.tzinfo is None:
            raise ValueError("measured_at: give the offset from UTC")
        if self.items is not None and len({item.id for item in self.items}) < len(self.items):
            raise ValueError("items: an id occurs twice")
        return self


class PostedResults(Frozen):
    """Results that belong together: those of one subject and step are one look."""

    results: tuple[PostedResult, ...] = Field(min_length=1, max_length=MAX_RESULTS)
