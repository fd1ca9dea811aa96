"""What is found in valid rows: repeats, empty answers, lengths, and what two files share."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.data_checks import KnownRows, find_in_file, measure
from app.domain.row_checks import LISTED_LINES, RowChecks, RowTally
from app.domain.rows import Row, check_rows, parse_row
from app.errors import BadRequest


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | more


def checked(*rows: dict[str, Any]) -> RowChecks:
    return check_rows(json.dumps(row) for row in rows).checks


def parsed(*rows: dict[str, Any]) -> list[Row]:
    return [parse_row(json.dumps(row), line_number=1) for row in rows]


def test_rows_equal_to_an_earlier_one_are_found_with_their_lines() -> None:
    found = checked(chat("q", "a"), chat("q", "b"), chat("q", "a"), chat("q", "a", domain="d"))
    assert (found.duplicates.count, found.duplicates.lines) == (2, (3, 4))
    assert checked(chat("q", "a"), chat("q", "a", tools=[{"x": 1}])).duplicates.count == 0
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": "{}"}}]}
    asked = {"role": "user", "content": "q"}
    assert checked({"messages": [asked, call]}, {"messages": [asked, other]}).duplicates.count == 0
    assert checked({"messages": [asked, call]}, {"messages": [asked, call]}).duplicates.count == 1


def test_answers_of_white_space_are_found_but_calls_are_answers() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    unlearned = {"role": "assistant", "content": "", "weight": 0}
    found = checked(
        chat("q", " \n"),
        {"messages": [{"role": "user", "content": "q"}, call]},
        {"messages": [unlearned, {"role": "assistant", "content": "a"}]},
        chat("q", "a"),
    )
    assert (found.empty_answers.count, found.empty_answers.lines) == (1, (1,))


@pytest.mark.parametrize(
    "row", [chat("q", ""), {"prompt": "p", "completion": "\t"}, {"text": "\n"}]
)
def test_a_file_of_empty_answers_alone_is_refused_with_its_lines(row: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"nothing to learn.*lines 1, 2\)") as refused:
        checked(row, row)
    assert refused.value.code == "invalid_row"


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=50))
def test_every_length_is_in_the_bucket_that_holds_it(sizes: list[int]) -> None:
    tally = RowTally()
    for line, size in enumerate(sizes, start=1):
        tally.take(line, key=line, size_bytes=size, has_empty_answer=False)
    found = tally.finish()
    bounds = [bucket.up_to_bytes for bucket in found.lengths]
    assert bounds == sorted(set(bounds))
    lower = -1
    for bucket in found.lengths:
        inside = [size for size in sizes if lower < size <= bucket.up_to_bytes]
        assert (bucket.num_rows, bucket.shortest_bytes) == (len(inside), min(inside))
        lower = bucket.up_to_bytes
    assert (found.text_bytes, found.longest_bytes) == (sum(sizes), max(sizes))
    if max(sizes):
        assert sizes[found.longest_line - 1] == max(sizes)


def test_rows_over_the_length_are_those_certainly_over_it() -> None:
    rows = [{"text": "x" * size} for size in (100, 100, 2000, 2000, 9000)]
    checks = checked(*rows)
    measured = measure(
        checks, param="training_file", file="f", num_rows=5, bytes_per_token=4.0, max_seq_length=256
    )
    assert measured.rows_over_length == 3
    assert measured.estimated_tokens == 13_200 / 4 + 4 * 5
    assert sum(bucket.num_rows for bucket in measured.lengths) == 5
    codes = {each.code: each for each in find_in_file(checks, measured, None)}
    assert set(codes) == {"duplicate_rows", "rows_over_length"}
    assert codes["rows_over_length"].lines == (5,)
    assert "line 5" in codes["rows_over_length"].message
    ample = measure(
        checks, param="p", file="f", num_rows=5, bytes_per_token=4.0, max_seq_length=10_000
    )
    assert ample.rows_over_length == 0


def test_lists_of_lines_are_bounded() -> None:
    checks = checked(*[chat("q", "a")] * 100)
    measured = measure(
        checks, param="p", file="f", num_rows=100, bytes_per_token=1.0, max_seq_length=64
    )
    (found,) = find_in_file(checks, measured, None)
    assert (found.count, len(found.lines)) == (99, LISTED_LINES)
    assert found.message.endswith("and 79 more).")


def test_shared_rows_and_shared_questions_are_told_apart() -> None:
    known = KnownRows(parsed(chat("What is THIS?", "it"), {"prompt": "p", "completion": "c"}))
    rows = parsed(
        chat("what is this", "It!"),
        chat("What is this?", "another thing"),
        chat("unrelated", "it"),
        {"prompt": "p", "completion": "c"},
        {"text": "what is this it"},
    )
    found = known.find_leaks(enumerate(rows, start=1), "validation_file")
    told = {each.code: (each.count, each.lines) for each in found}
    assert told == {
        "validation_in_training": (3, (1, 4, 5)),
        "validation_questions_in_training": (1, (2,)),
    }
    assert KnownRows(parsed({"text": "new"})).find_leaks(enumerate(rows, 1), "v") == []
