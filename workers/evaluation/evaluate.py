"""Scoring a model on chosen items of one benchmark."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from app.domain.benchmarks import GENERATION, Scorer, Scores
from app.domain.runplan import BenchmarkPlan
from workers.evaluation.choices import pick, score_choices
from workers.evaluation.forward import Reader, scoring
from workers.evaluation.generation import score_questions
from workers.evaluation.items import Prepared, prepare
from workers.evaluation.likelihood import score_texts, validation_loss

__all__ = ["evaluate", "validation_loss"]


def evaluate(  # noqa: PLR0913 - rank and world_size go together
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    benchmark: BenchmarkPlan,
    indices: NDArray[np.int64],
    *,
    chat_template: str | None,
    token_budget: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Scores, Scores | None]:
    """Scores of the chosen items; the same whatever the budget and the number of ranks.

    Args:
        model: A causal model; its mode is restored.
        tokenizer: Its tokenizer.
        benchmark: A benchmark version on local disk.
        indices: Positions of the items in the file.
        chat_template: Jinja text; None takes the tokenizer's own.
        token_budget: Columns times rows of one forward at most.
        rank: Of this process; it scores every `world_size`-th of the items, sorted by length.
        world_size: Number of processes.

    Returns:
        Float32 scores of the version's full length, NaN where an item was not scored here or its
        likelihoods are not finite; and token counts alike for `nll`, else None.

    Raises:
        TrainingFailed: An item is invalid, or the template can't be used.
    """
    prepared = prepare(benchmark, tokenizer, chat_template=chat_template)
    own = _share(prepared, indices, rank, world_size)
    scores = np.full(len(prepared), np.nan, np.float32)
    tokens: Scores | None = None
    with scoring(model):
        reader = Reader(model)
        match benchmark.scorer:
            case Scorer.MULTIPLE_CHOICE:
                chosen = [prepared.choices[i] for i in own]
                sums = score_choices(reader, chosen, token_budget)
                scores[own] = [pick(s, c.answer) for s, c in zip(sums, chosen, strict=True)]
            case scorer if scorer in GENERATION:
                scores[own] = score_questions(
                    reader, prepared, own, tokenizer, token_budget, scorer
                )
            case _:
                texts = [prepared.texts[i] for i in own]
                tokens = np.full(len(prepared), np.nan, np.float32)
                scores[own], tokens[own] = score_texts(reader, texts, token_budget)
    return scores, tokens


def _share(prepared: Prepared, indices: NDArray[np.int64], rank: int, world_size: int) -> list[int]:
    """This rank's items: every n-th in order of length, so that all ranks get about the same work."""
    chosen: list[int] = [int(i) for i in indices]
    if world_size == 1:
        return chosen
    return sorted(chosen, key=lambda i: (_num_tokens(prepared, i), i))[rank::world_size]


def _num_tokens(prepared: Prepared, index: int) -> int:
    if prepared.choices:
        item = prepared.choices[index]
        return len(item.context) + sum(map(len, item.choices))
    if prepared.questions:
        return len(prepared.questions[index].prompt)
    return len(prepared.texts[index].ids)
