"""Evaluation of chosen items: the same scores whatever the budget, ranks and order; real benchmarks too."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from app.domain.benchmarks import GENERATION, SCORER_MODULES, Scorer
from app.errors import TrainingFailed
from tests.workers.evaluation.cases import Tiny, choice_items, make_benchmark, make_tiny, words
from workers.data.rendering import DEFAULT_CHAT_TEMPLATE
from workers.evaluation.evaluate import evaluate
from workers.evaluation.items import load_items, prepare

AVAILABLE = [
    scorer
    for scorer in Scorer
    if scorer not in SCORER_MODULES or find_spec(SCORER_MODULES[scorer][0]) is not None
]
DATA = Path(__file__).parents[4] / "shared" / "data" / "benchmarks"


def make_plan(path: Path, scorer: Scorer):
    if scorer is Scorer.MULTIPLE_CHOICE:
        return make_benchmark(path, scorer, choice_items(60))
    if scorer in GENERATION:
        items = [{"id": str(i), "question": words(1 + i % 9, i), "answer": "g"} for i in range(60)]
        return make_benchmark(path, scorer, items)
    return make_benchmark(
        path, scorer, [{"id": str(i), "text": words(1 + i % 9, i)} for i in range(60)]
    )


def run(tiny: Tiny, plan, indices, **more):
    arguments = {"chat_template": None, "token_budget": 500, **more}
    return evaluate(tiny.model, tiny.tokenizer, plan, np.asarray(indices), **arguments)


@pytest.mark.parametrize("scorer", AVAILABLE)
def test_scores_do_not_depend_on_budget_order_or_company(tmp_path, scorer) -> None:
    tiny = make_tiny()
    plan = make_plan(tmp_path / "b", scorer)
    base, _ = run(tiny, plan, range(60))
    assert np.isfinite(base).all()
    others = [
        run(tiny, plan, range(60), token_budget=1)[0],
        run(tiny, plan, range(60), token_budget=10_000)[0],
        run(tiny, plan, range(59, -1, -1))[0],
    ]
    for other in others:
        if scorer is Scorer.NLL:
            assert other == pytest.approx(base, rel=1e-5)
        else:
            assert np.array_equal(other, base)
    some, _ = run(tiny, plan, [3, 40])
    assert np.flatnonzero(np.isfinite(some)).tolist() == [3, 40]
    assert some[[3, 40]] == pytest.approx(base[[3, 40]], rel=1e-5)


@pytest.mark.parametrize("scorer", AVAILABLE)
def test_ranks_share_the_items_and_together_score_all(tmp_path, scorer) -> None:
    tiny = make_tiny()
    plan = make_plan(tmp_path / "b", scorer)
    whole, counts = run(tiny, plan, range(50))
    parts = [run(tiny, plan, range(50), rank=rank, world_size=3) for rank in range(3)]
    scored = np.stack([np.isfinite(scores) for scores, _ in parts])
    assert scored.sum(axis=0).tolist() == [1] * 50 + [0] * 10
    assert np.nansum([s for s, _ in parts], axis=0)[:50] == pytest.approx(whole[:50], rel=1e-5)
    if counts is not None:
        merged = np.nansum([c for _, c in parts], axis=0)[:50]
        assert np.array_equal(merged, counts[:50])


def test_the_mode_of_the_model_comes_back_and_gradients_still_work(tmp_path) -> None:
    tiny = make_tiny()
    plan = make_plan(tmp_path / "b", Scorer.MULTIPLE_CHOICE)
    for was_training in (True, False):
        tiny.model.train(was_training)
        run(tiny, plan, range(9))
        assert tiny.model.training is was_training
    tiny.model(input_ids=torch.tensor([[7, 8, 9]])).logits.sum().backward()
    assert tiny.model.get_input_embeddings().weight.grad is not None


def test_a_model_that_is_not_finite_scores_nan(tmp_path) -> None:
    tiny = make_tiny()
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight.fill_(float("nan"))
    scores, _ = run(tiny, make_plan(tmp_path / "b", Scorer.MULTIPLE_CHOICE), range(9))
    assert np.isnan(scores).all()


def test_items_are_prepared_once_for_a_tokenizer_and_template(tmp_path) -> None:
    tiny = make_tiny()
    plan = make_plan(tmp_path / "b", Scorer.MULTIPLE_CHOICE)
    first = prepare(plan, tiny.tokenizer, chat_template=None)
    assert prepare(plan, make_tiny(1).tokenizer, chat_template=None) is first
    assert prepare(plan, tiny.tokenizer, chat_template=DEFAULT_CHAT_TEMPLATE) is not first


def test_a_file_is_read_again_when_it_changed(tmp_path) -> None:
    plan = make_plan(tmp_path / "b", Scorer.NLL)
    assert load_items(Path(plan.path), Scorer.NLL) is load_items(Path(plan.path), Scorer.NLL)
    make_benchmark(tmp_path / "b", Scorer.NLL, [{"id": "a", "text": "other"}])
    assert len(load_items(Path(plan.path), Scorer.NLL)) == 1


def test_a_bad_item_fails_the_run_with_its_line(tmp_path) -> None:
    plan = make_benchmark(tmp_path / "b", Scorer.NLL, [{"id": "a"}])
    with pytest.raises(TrainingFailed, match="line 1: text") as caught:
        run(make_tiny(), plan, [0])
    assert caught.value.code == "invalid_row"


def test_questions_look_like_the_training_rows_of_the_template(tmp_path) -> None:
    tiny = make_tiny()
    item = {"id": "a", "question": "2+2?", "choices": ["4", "55"], "answer": 0}
    plan = make_benchmark(tmp_path / "b", Scorer.MULTIPLE_CHOICE, [item])
    (found,) = prepare(plan, tiny.tokenizer, chat_template=None).choices
    assert tiny.tokenizer.decode(found.context) == "<|user|>2+2?<|end|><|assistant|>"
    assert [tiny.tokenizer.decode(choice) for choice in found.choices] == ["4", "55"]
    (found,) = prepare(plan, tiny.tokenizer, chat_template=DEFAULT_CHAT_TEMPLATE).choices
    assert tiny.tokenizer.decode(found.context) == "<s>User: 2+2?\nAssistant:"
    assert [tiny.tokenizer.decode(choice) for choice in found.choices] == [" 4", " 55"]


def test_visible_text_that_a_template_puts_before_answers_belongs_to_the_question(tmp_path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:<think></think> {% else %}U:{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    tiny = make_tiny()
    item = {"id": "a", "question": "q", "choices": ["4", "5"], "answer": 0}
    plan = make_benchmark(tmp_path / "b", Scorer.MULTIPLE_CHOICE, [item])
    (found,) = prepare(plan, tiny.tokenizer, chat_template=template).choices
    assert tiny.tokenizer.decode(found.context) == "U:qA:<think></think> "
    assert tiny.tokenizer.decode(found.choices[0]) == "4"


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("name", "scorer"),
    [
        ("arc_easy", Scorer.MULTIPLE_CHOICE),
        ("boolq", Scorer.MULTIPLE_CHOICE),
        ("nq_open", Scorer.EXACT_MATCH),
        ("bbh_gen", Scorer.EXACT_MATCH),
    ],
)
def test_public_benchmarks_are_scored_unchanged(tmp_path, name, scorer) -> None:
    tiny = make_tiny()
    lines = (DATA / name / "test.jsonl").read_text().splitlines()[:12]
    path = tmp_path / "b"
    path.write_text("\n".join(lines))
    plan = make_benchmark(tmp_path / "other", scorer, []).model_copy(
        update={"path": str(path), "sha256": name}
    )
    scores, _ = run(tiny, plan, range(12), chat_template=DEFAULT_CHAT_TEMPLATE, token_budget=4096)
    assert set(scores.tolist()) <= {0.0, 1.0}
