"""Multiple choice: log-likelihood of every choice, the question read once for all of them.

An item's score is 1 when the right choice has the highest log-likelihood summed over its tokens, as
lm-eval's `acc` (not divided by length); of equal ones the first counts.
"""

# Shape letters: B rows, T tokens, N scored tokens.

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import DynamicCache

from workers.evaluation.forward import Reader, log_probs, pad_rows, token_batches
from workers.evaluation.items import ChoiceItem

CPU_TOKENS = 1024  # larger passes leave the processor's cache: 46 items/s fell to 35 at 4,096
SPREAD_TOKENS = (
    2  # contexts of a batch differ by no more than this, or by a sixteenth of the length
)


def score_choices(
    reader: Reader, items: Sequence[ChoiceItem], token_budget: int
) -> list[NDArray[np.float64]]:
    """Summed log-likelihood in nats of each choice of each item.

    Args:
        reader: The model, in inference mode.
        items: Longer than the model's context: the question loses its start.
        token_budget: Columns times rows of one forward at most.
    """
    items = [_fit(item, reader.max_tokens) for item in items]
    results: list[NDArray[np.float64]] = [np.zeros(len(item.choices)) for item in items]
    flat = [i for i, item in enumerate(items) if all(len(choice) == 1 for choice in item.choices)]
    flat_set = set(flat)
    branched = [i for i in range(len(items)) if i not in flat_set]
    lengths = np.asarray([len(item.context) for item in items], np.int64)
    flat.sort(key=lambda i: int(lengths[i]))
    for batch in token_batches(flat, lengths, token_budget):
        chosen = [items[i] for i in batch]
        for i, sums in zip(batch, _score_flat(reader, chosen), strict=True):
            results[i] = sums
    totals = np.asarray([_tree_tokens(item) for item in items], np.int64)
    trees = [i for i in branched if reader.takes_trees(int(totals[i]))]
    if trees and not reader.check_trees(lambda: _trees_agree(reader, items[trees[0]])):
        trees = []
    trees.sort(key=lambda i: int(totals[i]))
    most = min(token_budget, CPU_TOKENS) if reader.device.type == "cpu" else token_budget
    for batch in token_batches(trees, totals, most):
        chosen = [items[i] for i in batch]
        for i, sums in zip(batch, _score_trees(reader, chosen), strict=True):
            results[i] = sums
    branched = sorted(set(branched) - set(trees))
    branched.sort(key=lambda i: (int(lengths[i]), max(map(len, items[i].choices))))
    for batch in _branched_batches(branched, items, token_budget):
        chosen = [items[i] for i in batch]
        for i, sums in zip(batch, _score_branched(reader, chosen), strict=True):
            results[i] = sums
    return results


def pick(sums: NDArray[np.float64], answer: int) -> float:
    """1 when the answer has the highest sum, else 0; NaN when a sum isn't finite."""
    if not np.isfinite(sums).all():
        return float("nan")
    return float(int(np.argmax(sums)) == answer)


def _score_flat(reader: Reader, items: Sequence[ChoiceItem]) -> Iterator[NDArray[np.float64]]:
    """Choices of one token each: they all follow the same position."""
    padded_BT = pad_rows([item.context for item in items])
    last = [row * padded_BT.shape[1] + len(item.context) - 1 for row, item in enumerate(items)]
    row_of_N = [row for row, item in enumerate(items) for _ in item.choices]
    targets_N = [choice[0] for item in items for choice in item.choices]
    logits = reader.logits(reader.tensor(padded_BT), reader.tensor(last)).float()
    found = logits - logits.logsumexp(dim=-1, keepdim=True)
    values = found[reader.tensor(row_of_N), reader.tensor(targets_N)].double().cpu().numpy()
    return iter(np.split(values, np.cumsum([len(item.choices) for item in items])[:-1]))


def _score_trees(reader: Reader, items: Sequence[ChoiceItem]) -> Iterator[NDArray[np.float64]]:
    """One row an item: the context, then every choice as a branch that sees the context and itself."""
    rows = [item.context + [t for choice in item.choices for t in choice[:-1]] for item in items]
    padded_BT = pad_rows(rows)
    places_BT = np.zeros_like(padded_BT)
    branch_BT = np.full_like(padded_BT, -1)  # 0 for the context, -1 for padding
    columns: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    num_choices = 0
    for b, item in enumerate(items):
        end = len(item.context)
        places_BT[b, :end] = np.arange(end)
        branch_BT[b, :end] = 0
        column = end
        for k, choice in enumerate(item.choices, start=1):
            width = len(choice) - 1
            places_BT[b, column : column + width] = np.arange(end, end + width)
            branch_BT[b, column : column + width] = k
            start = b * padded_BT.shape[1]
            columns += [start + end - 1, *range(start + column, start + column + width)]
            targets += choice
            owner += [num_choices] * len(choice)
            column += width
            num_choices += 1
    branch = reader.tensor(branch_BT)
    allowed = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    tree = (reader.tensor(places_BT), allowed.tril()[:, None])
    logits = reader.logits(reader.tensor(padded_BT), reader.tensor(columns), tree=tree)
    values = log_probs(logits, reader.tensor(targets)).double().cpu().numpy()
    sums = np.bincount(owner, weights=values, minlength=num_choices)
    return iter(np.split(sums, np.cumsum([len(item.choices) for item in items])[:-1]))


def _trees_agree(reader: Reader, item: ChoiceItem) -> bool:
    """Whether a branching row gives what separate rows give: a model may read masks in its own way."""
    tree = next(_score_trees(reader, [item]))
    rows = next(_score_branched(reader, [item]))
    tolerance = 1e-4 if reader.is_exact else 0.05
    return bool((np.abs(tree - rows) <= tolerance * (1.0 + np.abs(rows))).all())


def _tree_tokens(item: ChoiceItem) -> int:
    return len(item.context) + sum(len(choice) - 1 for choice in item.choices)


def _score_branched(reader: Reader, items: Sequence[ChoiceItem]) -> Iterator[NDArray[np.float64]]:
    """One pass over what the contexts have in common in length, then one over the rest with each choice.

    The first pass leaves at least one token of each context to the second, as the logits of a choice's
    first token are those of the context's last.
    """
    shared = min(len(item.context) for item in items) - 1
    cache = None
    item_of_B = [k for k, item in enumerate(items) for _ in item.choices]
    if shared > 0:
        cache = DynamicCache(config=reader.config)
        heads_BT = reader.tensor([item.context[:shared] for item in items])
        reader.logits(heads_BT, reader.tensor([0]), cache=cache)
        cache.batch_select_indices(reader.tensor(item_of_B))
    tails = [item.context[shared:] + choice[:-1] for item in items for choice in item.choices]
    padded_BT = pad_rows(tails)
    choices = [choice for item in items for choice in item.choices]
    starts = np.asarray([len(items[k].context) - shared - 1 for k in item_of_B], np.int64)
    counts = np.asarray([len(choice) for choice in choices], np.int64)
    row_of_N = np.repeat(np.arange(len(choices)), counts)
    within_N = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    positions_N = row_of_N * padded_BT.shape[1] + starts[row_of_N] + within_N
    targets_N = np.concatenate([np.asarray(choice, np.int64) for choice in choices])
    logits = reader.logits(reader.tensor(padded_BT), reader.tensor(positions_N), cache=cache)
    values_N = log_probs(logits, reader.tensor(targets_N)).double().cpu().numpy()
    sums = np.bincount(row_of_N, weights=values_N, minlength=len(choices))
    return iter(np.split(sums, np.cumsum([len(item.choices) for item in items])[:-1]))


def _branched_batches(
    order: Sequence[int], items: Sequence[ChoiceItem], token_budget: int
) -> Iterator[list[int]]:
    """Items of nearly equal context length whose second pass, which is the wider one, fits the budget."""
    batch: list[int] = []
    rows = columns = shortest = 0
    for index in order:
        item = items[index]
        length = len(item.context)
        shortest = shortest if batch else length
        wide = max(columns, length - shortest + max(map(len, item.choices)))
        more = rows + len(item.choices)
        cost = max(more * wide, (len(batch) + 1) * shortest)
        if batch and (cost > token_budget or length - shortest > max(SPREAD_TOKENS, length // 16)):
            yield batch
            batch, shortest = [], length
            wide, more = max(map(len, item.choices)), len(item.choices)
        batch.append(index)
        rows, columns = more, wide
    if batch:
        yield batch


def _fit(item: ChoiceItem, max_tokens: int) -> ChoiceItem:
    """Takes tokens off the start of the question where question and longest choice exceed the context."""
    room = max(max_tokens - max(map(len, item.choices)), 1)
    if len(item.context) <= room:
        return item
    return ChoiceItem(item.context[-room:], item.choices, item.answer)
