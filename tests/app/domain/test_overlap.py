"""Overlap of general rows with benchmark items."""

import json
from pathlib import Path

import pytest

from app.domain.benchmarks import MultipleChoiceItem, Scorer
from app.domain.conversations import ChatRow
from app.domain.overlap import drop_overlapping, item_texts, row_texts
from app.domain.rows import parse_item, parse_row

WORDS = [f"w{i}" for i in range(40)]


def test_equal_texts_overlap_whatever_their_case_and_punctuation() -> None:
    kept, dropped = drop_overlapping(
        [["Where is Paris?!"], ["Where was Paris?"], ["x", "WHERE  is\nparis"]], ["where is Paris"]
    )
    assert (kept, dropped) == ([1], 2)


@pytest.mark.parametrize(("shared", "dropped"), [(12, 0), (13, 1), (20, 1)])
def test_thirteen_words_in_a_row_overlap_and_twelve_do_not(shared, dropped) -> None:
    benchmark = " ".join(WORDS[:30])
    row = "before " + " ".join(WORDS[5 : 5 + shared]) + " after"
    assert drop_overlapping([[row]], [benchmark])[1] == dropped


def test_scripts_without_spaces_are_compared_by_character() -> None:
    text = "中华人民共和国成立于一九四九年十月一日"
    assert drop_overlapping([[f"请问{text}对吗"]], [f"题目{text}"])[1] == 1
    assert drop_overlapping([[text[:12]]], [text])[1] == 0


def test_texts_of_symbols_are_compared_as_they_are() -> None:
    assert drop_overlapping([["( [ ]"], ["( ( )"]], ["( [ ]"]) == ([1], 1)


def test_nothing_to_compare_keeps_all() -> None:
    assert drop_overlapping([["a"], ["b"]], []) == ([0, 1], 0)
    assert drop_overlapping([], ["a"]) == ([], 0)


def test_the_texts_of_rows_and_items() -> None:
    row = parse_row(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        line_number=1,
    )
    assert row_texts(row) == ["q", "a", "q a"]
    assert row_texts(parse_row('{"prompt": "p", "completion": "c"}', line_number=1)) == ["p", "c"]
    assert row_texts(parse_row('{"text": "t"}', line_number=1)) == ["t"]
    choice = {"id": "1", "question": "q", "choices": ["a", "b"], "answer": 0}
    assert item_texts(parse_item(json.dumps(choice), Scorer.MULTIPLE_CHOICE, line_number=1)) == [
        "q",
        "q a b",
    ]
    free = {"id": "1", "question": "q", "answer": "a"}
    assert item_texts(parse_item(json.dumps(free), Scorer.EXACT_MATCH, line_number=1)) == [
        "q",
        "q a",
    ]
    assert item_texts(parse_item('{"id": "1", "text": "t"}', Scorer.NLL, line_number=1)) == ["t"]
    assert isinstance(row, ChatRow)
    talk = {"id": "1", "messages": [m.model_dump(exclude_none=True) for m in row.messages]}
    assert item_texts(parse_item(json.dumps(talk), Scorer.NLL, line_number=1)) == ["q a"]


DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
def test_real_general_rows_do_not_overlap_a_real_benchmark_but_planted_ones_do() -> None:
    lines = (DATA / "general/alpaca_en/validation.jsonl").read_text().splitlines()
    items = (DATA / "benchmarks/arc_easy/test.jsonl").read_text().splitlines()
    parsed = [parse_item(x, Scorer.MULTIPLE_CHOICE, line_number=i) for i, x in enumerate(items, 1)]
    texts = [text for item in parsed for text in item_texts(item)]
    rows = [row_texts(parse_row(line, line_number=i)) for i, line in enumerate(lines, 1)]
    assert drop_overlapping(rows, texts) == (list(range(len(rows))), 0)
    questions = [item.question for item in parsed if isinstance(item, MultipleChoiceItem)]
    long = next(question for question in questions if len(question.split()) > 20)
    planted = [*rows, ["Tell me: " + long]]
    assert drop_overlapping(planted, texts)[1] == 1
