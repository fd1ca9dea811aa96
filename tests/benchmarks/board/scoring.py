"""Fast scorers: one batched pass gives exact match of the greedy answer and the choice of highest likelihood."""

# Shape letters: B rows, T tokens, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tests.benchmarks.board.material import encode_row
from workers.demo_model.skills import Question
from workers.strategies.modes import evaluating
from workers.training.forward import SelectedLogits

BATCH_ROWS = 256
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Prepared:
    """Items as rows: each choice of an item is a row of its own.

    All but `num_items` is per row; rows are sorted by length.
    """

    rows: tuple[tuple[NDArray[np.int32], int], ...]  # token ids, and where the answer begins
    item_of: NDArray[np.int64]
    is_right: Bools
    num_items: int

    def prompts(self) -> list[NDArray[np.int32]]:
        """Token ids of each item's prompt, in the order of the items."""
        found = {
            int(item): ids[:begin]
            for item, (ids, begin) in zip(self.item_of, self.rows, strict=True)
        }
        return [found[item] for item in range(self.num_items)]


def prepare(tokenizer: Any, questions: Sequence[Question], *, choices: bool) -> Prepared:
    """Tokenises items; without `choices` only the right answer is scored, for exact match alone."""
    rows, item_of, is_right = [], [], []
    for item, question in enumerate(questions):
        for choice in question.choices:
            if not choices and choice != question.answer:
                continue
            ids, weights = encode_row(tokenizer, question.prompt, choice)
            rows.append((ids, int(np.argmax(weights > 0))))
            item_of.append(item)
            is_right.append(choice == question.answer)
    order = np.argsort([len(ids) for ids, _ in rows], kind="stable")
    return Prepared(
        rows=tuple(rows[i] for i in order),
        item_of=np.asarray(item_of, np.int64)[order],
        is_right=np.asarray(is_right, bool)[order],
        num_items=len(questions),
    )


@dataclass(frozen=True)
class Scores:
    """Per item, in the order of the questions: the greedy answer, end included, is right; the likeliest choice is."""

    exact_match: Bools
    multiple_choice: Bools
    loss_nats: float  # mean of the right answers' tokens


def subset(prepared: Prepared, items: NDArray[np.int64]) -> Prepared:
    """Those items alone, numbered anew in the order given."""
    number_of = np.full(prepared.num_items, -1)
    number_of[items] = np.arange(len(items))
    kept = np.flatnonzero(number_of[prepared.item_of] >= 0)
    return Prepared(
        rows=tuple(prepared.rows[i] for i in kept),
        item_of=number_of[prepared.item_of[kept]],
        is_right=prepared.is_right[kept],
        num_items=len(items),
    )


@torch.no_grad()
def score(student: SelectedLogits, prepared: Prepared) -> Scores:
    """Exact match and multiple choice of every item.

    Greedy decoding gives the answer exactly when every token of it is the most likely one behind the right
    tokens before it, so one pass over the right answers replaces generation. Choices are compared by the sum
    of their tokens' log-probabilities.
    """
    sums, matched, num_tokens = [], [], []
    for start in range(0, len(prepared.rows), BATCH_ROWS):
        part = prepared.rows[start : start + BATCH_ROWS]
        with evaluating(student.model):
            logits, targets, row_of = _answer_logits(student, part)
        losses = F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(-1) == targets).to(torch.float32)
        size = len(part)
        count = torch.zeros(size).index_add_(0, row_of, torch.ones_like(losses))
        sums.append(-torch.zeros(size).index_add_(0, row_of, losses))
        matched.append(torch.zeros(size).index_add_(0, row_of, right) == count)
        num_tokens.append(count)
    return _per_item(
        prepared,
        torch.cat(sums).double().numpy(),
        torch.cat(matched).numpy(),
        float(torch.cat(num_tokens)[torch.from_numpy(prepared.is_right)].sum()),
    )


def _per_item(
    prepared: Prepared, sums: NDArray[np.float64], matched: Bools, num_tokens: float
) -> Scores:
    exact = np.zeros(prepared.num_items, bool)
    exact[prepared.item_of[prepared.is_right]] = matched[prepared.is_right]
    best = np.full(prepared.num_items, -np.inf)
    np.maximum.at(best, prepared.item_of, sums)
    right = np.full(prepared.num_items, -np.inf)
    right[prepared.item_of[prepared.is_right]] = sums[prepared.is_right]
    loss = -float(sums[prepared.is_right].sum()) / num_tokens
    return Scores(exact, right >= best, loss)


def _answer_logits(
    student: SelectedLogits, rows: Sequence[tuple[NDArray[np.int32], int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at the positions before each answer token, those tokens, and the row of each."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    positions, targets, row_of = [], [], []
    for row, (ids, begin) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        positions += [row * width + column - 1 for column in range(begin, len(ids))]
        targets += ids[begin:].tolist()
        row_of += [row] * (len(ids) - begin)
    logits = student(ids_BT, torch.tensor(positions)).float()
    return logits, torch.tensor(targets), torch.tensor(row_of)
