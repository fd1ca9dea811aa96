"""Tasks of lm-evaluation-harness as items: its prompts, our scorers where they are equal, nothing from a network."""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from app.domain.benchmarks import Scorer
from app.domain.rows import check_items
from app.errors import BadRequest
from tests.workers.evaluation.cases import make_tiny
from workers.evaluation import harness

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is no dependency of the server"
)
# The harness and `datasets` leave files open and warn of their own future.
pytestmark = pytest.mark.filterwarnings("default")

CHOICES = """
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: a
doc_to_choice: "{{c}}"
metric_list: [{metric: METRIC}]
"""
ANSWERS = """
output_type: generate_until
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: "{{t}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match, SETTINGS}]
"""


def write_task(path: Path, name: str, rows: list[dict[str, Any]], text: str) -> None:
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"test_split: test\nmetadata: {{version: 2.0}}\n{text}"
    )


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"q": f"q{i}", "c": ["x", "y"], "a": i % 2, "subject": "law"} for i in range(6)]
    write_task(tmp_path, "exam", [*rows, rows[0]], CHOICES.replace("METRIC", "acc"))
    write_task(tmp_path, "norm", rows, CHOICES.replace("METRIC", "acc_norm"))
    said = [{"q": f"q{i}", "t": f"answer {i}"} for i in range(4)]
    write_task(tmp_path, "free", said, ANSWERS.replace("SETTINGS", "ignore_case: true"))
    write_task(tmp_path, "strict", said, ANSWERS.replace("SETTINGS", "ignore_case: false"))
    return tmp_path


@needs_harness
def test_multiple_choice_documents_become_items_with_stable_ids(tasks: Path) -> None:
    found = harness.import_task("exam", include_path=tasks)
    assert (found.scorer, len(found.items), found.num_repeated) == (Scorer.MULTIPLE_CHOICE, 6, 1)
    one = found.items[1]
    assert (one["question"], one["choices"], one["answer"]) == ("Q: q1\nA:", ["x", "y"], 1)
    assert one["subject"] == "law"
    assert found.source.startswith("lm_eval ")
    assert "exam@2.0, 0-shot, metrics acc" in found.source
    again = harness.import_task("exam", include_path=tasks)
    assert [item["id"] for item in again.items] == [item["id"] for item in found.items]
    lines = [json.dumps(item) for item in found.items]
    assert check_items(lines, Scorer.MULTIPLE_CHOICE).num_items == 6


@needs_harness
def test_generated_answers_take_our_match_where_it_is_the_same(tasks: Path) -> None:
    found = harness.import_task("free", include_path=tasks)
    assert found.scorer is Scorer.EXACT_MATCH
    assert (found.items[2]["answer"], found.items[2]["subject"]) == ("answer 2", "free")
    assert check_items(map(json.dumps, found.items), Scorer.EXACT_MATCH).num_items == 4


@needs_harness
@pytest.mark.parametrize(
    ("name", "other"), [("norm", Scorer.MULTIPLE_CHOICE), ("strict", Scorer.TOKEN_F1)]
)
def test_a_metric_without_an_equal_asks_for_a_scorer(tasks: Path, name: str, other: Scorer) -> None:
    with pytest.raises(BadRequest, match="no scorer here equals") as error:
        harness.import_task(name, include_path=tasks)
    assert error.value.param == "scorer"
    assert harness.import_task(name, include_path=tasks, scorer=other).scorer is other
    with pytest.raises(BadRequest, match="does not score"):
        harness.import_task(name, include_path=tasks, scorer=Scorer.NLL)


@needs_harness
def test_what_is_not_there_is_said(tasks: Path) -> None:
    for name, path, param in (
        ("nope", tasks, "task"),
        ("exam", tasks / "nowhere", "include_path"),
    ):
        with pytest.raises(BadRequest) as error:
            harness.import_task(name, include_path=path)
        assert error.value.param == param


@needs_harness
def test_the_command_writes_the_items_and_says_what_they_are(tasks: Path, capsys) -> None:
    out = tasks / "items.jsonl"
    assert harness.main(["exam", "--include-path", str(tasks), "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["scorer"], told["num_items"]) == ("multiple_choice", 6)
    assert len(out.read_text().splitlines()) == 6


def test_without_the_harness_the_command_says_what_is_missing(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    out = tmp_path / "items.jsonl"
    assert harness.main(["exam", "--out", str(out)]) == 1
    assert "install lm-eval" in capsys.readouterr().err
    assert not out.exists()


@needs_harness
def test_our_answers_to_the_harness_are_those_of_its_own_transformers_model(tasks: Path) -> None:
    oracle = importlib.import_module("lm_eval.models.huggingface")
    runner = importlib.import_module("workers.evaluation.harness_model")
    tiny = make_tiny()
    theirs = oracle.HFLM(
        pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=1, device="cpu"
    )
    evaluate = importlib.import_module("lm_eval.evaluator").evaluate
    for name, metrics in (("exam", {"acc"}), ("norm", {"acc_norm"}), ("free", {"exact_match"})):
        found = runner.score_task(tiny.model, tiny.tokenizer, name, include_path=tasks)
        task = harness.load_tasks(name, tasks)[0]
        wanted = evaluate(theirs, {name: task}, bootstrap_iters=0)["samples"][name]
        assert set(found) == metrics
        for metric in metrics:
            assert found[metric] == {
                harness.document_id(name, sample["doc"]): sample[metric] for sample in wanted
            }
    ids = {item["id"] for item in harness.import_task("exam", include_path=tasks).items}
    assert (
        set(runner.score_task(tiny.model, tiny.tokenizer, "exam", include_path=tasks)["acc"]) == ids
    )


@needs_harness
def test_likelihoods_and_texts_are_those_of_the_harness_model() -> None:
    oracle = importlib.import_module("lm_eval.models.huggingface")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    runner = importlib.import_module("workers.evaluation.harness_model")
    forward = importlib.import_module("workers.evaluation.forward")
    tiny = make_tiny()
    theirs = oracle.HFLM(
        pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=1, device="cpu"
    )
    ours = runner._Answers(tiny.tokenizer, 3)
    pairs = [("apple bear", " cat"), ("dog ", "elk fox"), ("goat\nhen:", " apple apple")]
    asked = [instance("loglikelihood", {}, pair, 0) for pair in pairs]
    free = [
        instance("generate_until", {}, (context, {"until": [" "], "max_gen_toks": 8}), 0)
        for context, _ in pairs
    ]
    with forward.scoring(tiny.model):
        ours.reader = forward.Reader(tiny.model)
        found, texts = ours.loglikelihood(asked), ours.generate_until(free)
    wanted = theirs.loglikelihood(asked)
    assert [each[1] for each in found] == [each[1] for each in wanted]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in wanted], rel=1e-4)
    assert texts == theirs.generate_until(free)
