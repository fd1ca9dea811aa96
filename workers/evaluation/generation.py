"""Generated answers: greedy generation in batches without padding, scored against the accepted ones."""

# Shape letters: B rows, T tokens, V vocabulary.

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from app.domain.benchmarks import Scorer
from workers.evaluation.forward import Reader, pad_rows
from workers.evaluation.items import Prepared, QuestionItem
from workers.evaluation.scorers import find_scorer

SPREAD_TOKENS = 4  # prompts of a batch differ by no more than this, or by an eighth of the length


class StopRule:
    """When a row has said its answer: a closing token, or the line break after visible text.

    Args:
        prepared: The benchmark, with its closing tokens.
        tokenizer: Whose vocabulary says which tokens hold a line break or visible text.
        reader: Whose `generation_config` may name more closing tokens.
    """

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Any,  # noqa: ANN401 - transformers is untyped
        reader: Reader,
    ) -> None:
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        size = max(reader.vocab_size, max(vocabulary.values()) + 1)
        ends = np.zeros(size, np.bool_)
        breaks = np.zeros(size, np.bool_)
        visible = np.zeros(size, np.bool_)
        blank = "\u0120\u010a\u2581 \n\t\u010d\u0109"  # byte-level and SentencePiece spellings
        for text, index in vocabulary.items():
            breaks[index] = "\u010a" in text or "\n" in text or text == "<0x0A>"
            visible[index] = bool(text.strip(blank)) and text != "<0x0A>"
        ends[sorted(prepared.stop_ids)] = True
        self._ends = torch.from_numpy(ends).to(reader.device)
        self._breaks = torch.from_numpy(breaks & prepared.one_line).to(reader.device)
        self._visible = torch.from_numpy(visible).to(reader.device)

    def __call__(self, tokens_B: Tensor, seen_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows end with this token, and which have said something visible by now."""
        seen = seen_B | self._visible[tokens_B]
        return self._ends[tokens_B] | (self._breaks[tokens_B] & seen), seen


def score_questions(
    reader: Reader,
    prepared: Prepared,
    indices: Sequence[int],
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    token_budget: int,
    scorer: Scorer = Scorer.EXACT_MATCH,
) -> NDArray[np.float32]:
    """What each item's generated answer is worth, from 0 to 1.

    The answer is the first line with visible text (the whole text where an accepted answer has several
    lines), without special tokens.

    Raises:
        TrainingFailed: The scorer's library is not installed.
    """
    score = find_scorer(scorer)
    items = [_fit(prepared.questions[i], reader.max_tokens) for i in indices]
    stop = StopRule(prepared, tokenizer, reader)
    answers: list[list[int]] = [[] for _ in items]
    order = sorted(range(len(items)), key=lambda k: (len(items[k].prompt), items[k].max_tokens))
    for batch in _batches(order, items, token_budget):
        for k, ids in zip(batch, generate(reader, [items[k] for k in batch], stop), strict=True):
            answers[k] = ids
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return np.asarray(
        [
            score(_spoken(text, one_line=prepared.one_line), item.accepted)
            for text, item in zip(texts, items, strict=True)
        ],
        np.float32,
    )


def generate(reader: Reader, items: Sequence[QuestionItem], stop: StopRule) -> list[list[int]]:
    """Greedy continuations, without the closing token.

    All rows are at the same column in every pass: a longer prompt is still being read while a shorter
    one is already answered, so no row is padded and no mask is needed.
    """
    device = reader.device
    lengths_B = reader.tensor([len(item.prompt) for item in items])
    last_B = lengths_B + reader.tensor([item.max_tokens for item in items])
    prompts_BT = reader.tensor(pad_rows([item.prompt for item in items]))
    column = int(lengths_B.min())
    end = int(last_B.max())
    said_BT = torch.zeros((len(items), end), dtype=torch.int64, device=device)
    said_BT[:, : prompts_BT.shape[1]] = prompts_BT
    stops_B = last_B.clone()  # column at which the answer ends
    alive_B = torch.arange(len(items), device=device)
    seen_B = torch.zeros(len(items), dtype=torch.bool, device=device)
    cache = DynamicCache(config=reader.config)
    inputs_BT = said_BT[:, :column]
    while True:
        rows, width = inputs_BT.shape
        logits = reader.logits(
            inputs_BT, torch.arange(rows, device=device) * width + width - 1, cache=cache
        )
        forced_B = column < lengths_B[alive_B]
        tokens_B = torch.where(forced_B, said_BT[alive_B, column], logits.argmax(dim=-1))
        said_BT[alive_B, column] = tokens_B
        ended_B, seen_now = stop(tokens_B, seen_B)
        ended_B &= ~forced_B
        seen_B = torch.where(forced_B, seen_B, seen_now)
        stops_B[alive_B[ended_B]] = column
        column += 1
        going_B = ~ended_B & (column < last_B[alive_B])
        num_going = int(going_B.sum())
        if num_going == 0:
            break
        if num_going < rows:
            kept = going_B.nonzero()[:, 0]
            alive_B, seen_B = alive_B[kept], seen_B[kept]
            cache.batch_select_indices(kept)
        inputs_BT = said_BT[alive_B, column - 1 : column]
    said = said_BT.tolist()
    edges = zip(lengths_B.tolist(), stops_B.tolist(), strict=True)
    return [row[start:stop_at] for row, (start, stop_at) in zip(said, edges, strict=True)]


def _batches(
    order: Sequence[int], items: Sequence[QuestionItem], token_budget: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    longest = shortest = 0
    for k in order:
        length = len(items[k].prompt)
        shortest = shortest if batch else length
        total = max(longest, length + items[k].max_tokens)
        too_wide = length - shortest > max(SPREAD_TOKENS, length // 8)
        if batch and (too_wide or total * (len(batch) + 1) > token_budget):
            yield batch
            batch, shortest = [], length
            total = length + items[k].max_tokens
        batch.append(k)
        longest = total
    if batch:
        yield batch


def _spoken(text: str, *, one_line: bool) -> str:
    if one_line:
        text = next((line for line in text.splitlines() if line.strip()), "")
    return text.strip()


def _fit(item: QuestionItem, max_tokens: int) -> QuestionItem:
    """Takes tokens off the start of a prompt that leaves no room for the answer."""
    room = max(max_tokens - item.max_tokens, 1)
    if len(item.prompt) <= room:
        return item
    return QuestionItem(item.prompt[-room:], item.accepted, min(item.max_tokens, max_tokens - 1))
