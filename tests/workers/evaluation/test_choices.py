"""Multiple choice: equal to scoring every choice in a row of its own, whatever the batches."""

import numpy as np
import pytest
import torch

from app.domain.benchmarks import Scorer
from tests.workers.evaluation.cases import choice_items, make_benchmark, make_tiny
from workers.evaluation.choices import (
    _score_branched,
    _score_trees,
    _trees_agree,
    pick,
    score_choices,
)
from workers.evaluation.forward import Reader, scoring
from workers.evaluation.items import ChoiceItem, prepare


def separate_rows(model, items) -> list[list[float]]:
    """The oracle: one float64 log-softmax for each choice, in a row of its own."""
    results = []
    with torch.no_grad():
        for item in items:
            sums = []
            for choice in item.choices:
                ids = torch.tensor([item.context + choice])
                found = model(input_ids=ids).logits[0].double().log_softmax(-1)
                start = len(item.context) - 1
                sums.append(sum(float(found[start + j, token]) for j, token in enumerate(choice)))
            results.append(sums)
    return results


def scored(tiny, items, budget) -> list[np.ndarray]:
    with scoring(tiny.model):
        return score_choices(Reader(tiny.model), items, budget)


@pytest.mark.parametrize("one_letter", [False, True])
@pytest.mark.parametrize("budget", [1, 300, 4096])
def test_sums_equal_those_of_separate_rows(tmp_path, one_letter, budget) -> None:
    tiny = make_tiny()
    plan = make_benchmark(
        tmp_path / "b", Scorer.MULTIPLE_CHOICE, choice_items(16, one_letter=one_letter)
    )
    items = prepare(plan, tiny.tokenizer, chat_template=None).choices
    wanted = separate_rows(tiny.model.eval(), items)
    for found, expected in zip(scored(tiny, items, budget), wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_choices_of_one_and_several_tokens_may_stand_in_one_item() -> None:
    tiny = make_tiny()
    items = [
        ChoiceItem([7, 8, 9], [[10], [11, 12], [13, 14, 15]], 0),
        ChoiceItem([7], [[8], [9, 10]], 1),
    ]
    wanted = separate_rows(tiny.model.eval(), items)
    for found, expected in zip(scored(tiny, items, 4096), wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_question_beyond_the_context_loses_its_start() -> None:
    tiny = make_tiny()
    long = ChoiceItem([7 + i % 200 for i in range(700)], [[10, 11], [12, 13]], 0)
    cut = ChoiceItem(long.context[-510:], long.choices, 0)
    (found,) = scored(tiny, [long], 4096)
    assert found == pytest.approx(separate_rows(tiny.model.eval(), [cut])[0], rel=1e-5)


def test_the_highest_sum_wins_the_first_of_equals_and_nothing_when_not_finite() -> None:
    assert pick(np.asarray([-2.0, -1.0]), 1) == 1.0
    assert pick(np.asarray([-2.0, -1.0]), 0) == 0.0
    assert pick(np.asarray([-1.0, -1.0]), 0) == 1.0
    assert np.isnan(pick(np.asarray([-1.0, np.nan]), 0))
    assert np.isnan(pick(np.asarray([-1.0, -np.inf]), 0))


def test_no_items_give_no_sums() -> None:
    assert scored(make_tiny(), [], 100) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_branching_rows_and_separate_ones_agree(tmp_path, attention) -> None:
    tiny = make_tiny()
    tiny.model.set_attn_implementation(attention)
    plan = make_benchmark(tmp_path / "b", Scorer.MULTIPLE_CHOICE, choice_items(12))
    items = prepare(plan, tiny.tokenizer, chat_template=None).choices
    with scoring(tiny.model):
        reader = Reader(tiny.model)
        assert reader.takes_trees(512)
        assert not reader.takes_trees(513)
        in_trees = list(_score_trees(reader, items))
        in_rows = [next(_score_branched(reader, [item])) for item in items]
        assert _trees_agree(reader, items[0])
    for found, expected in zip(in_trees, in_rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_model_that_reads_masks_in_its_own_way_is_scored_without_trees(monkeypatch) -> None:
    tiny = make_tiny()
    items = [ChoiceItem([7, 8, 9], [[10, 12], [11, 12], [13, 14, 15]], 0)]
    wanted = separate_rows(tiny.model.eval(), items)
    # Branches that see each other: what an ignored mask does.
    monkeypatch.setattr(Reader, "_mask", lambda self, allowed: torch.ones_like(allowed).tril())
    (found,) = scored(tiny, items, 4096)
    assert found == pytest.approx(wanted[0], rel=1e-5)
