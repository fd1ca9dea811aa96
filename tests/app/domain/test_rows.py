"""Training rows and benchmark items: what is taken, and what is refused with line and field."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.benchmarks import ExactMatchItem, MultipleChoiceItem, Scorer
from app.domain.conversations import ChatRow
from app.domain.jsonlines import MAX_LINE_BYTES, read_lines
from app.domain.rows import (
    CompletionRow,
    RowFormat,
    TextRow,
    chance_level,
    check_items,
    check_rows,
    parse_item,
    parse_row,
)
from app.errors import BadRequest

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")


def chat(*turns: Mapping[str, object], **more: object) -> str:
    return json.dumps({"messages": list(turns), **more})


def refusal(line: bytes | str) -> str | None:
    """The code of the error, None for a good row."""
    try:
        parse_row(line, line_number=1)
    except BadRequest as error:
        return error.code
    return None


USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (chat(USER, ANSWER), ChatRow),
        (chat({"role": "developer", "content": "be brief"}, USER, ANSWER), ChatRow),
        (chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}), ChatRow),
        ('{"prompt": "", "completion": "x"}', CompletionRow),
        ('{"text": "\\ud83d\\ude00"}', TextRow),
    ],
)
def test_good_rows_are_taken_as_bytes_and_as_text(line, kind) -> None:
    assert isinstance(parse_row(line, line_number=1), kind)
    assert parse_row((line + "\r\n").encode(), line_number=1) == parse_row(line, line_number=1)


def test_a_tool_conversation_is_taken() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    row = parse_row(
        chat(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            ANSWER,
            tools=[{"type": "function", "function": {"name": "add", "parameters": {}}}],
        ),
        line_number=1,
    )
    assert isinstance(row, ChatRow)
    assert row.messages[1].content is None
    assert row.messages[1].tool_calls is not None
    assert row.messages[1].tool_calls[0].function.arguments == '{"a": 2}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"\xff", "not UTF-8: byte 1 is invalid"),
        ("\ufeff{}", "starts with a byte order mark; save the file as UTF-8 without one"),
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"text": "a\tb"}', "not JSON: Invalid control character at column 12"),
        ("[1]", "must be a JSON object"),
        ('{"text": "a", "text": "b"}', 'the key "text" occurs twice'),
        ('{"text": NaN}', "NaN is not a JSON number"),
        ('{"text": -Infinity}', "-Infinity is not a JSON number"),
        ('{"n": 1e999, "text": "a"}', "a number past the range of a double"),
        ('{"n": ' + "9" * 5000 + "}", "an integer of more than 18 digits"),
        ('{"text": "\\u0000"}', "holds a NUL character"),
        ('{"text": "\\ud800"}', "holds a lone surrogate"),
        ('{"\\udfff": 1}', "holds a lone surrogate"),
        ("[" * 100_000, "nested deeper than 32"),
        ('{"x": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
        ('{"text": "' + "a" * MAX_LINE_BYTES + '"}', "longer than 1,048,576 bytes"),
        (
            "{}",
            "must have exactly one of `messages`, `prompt` with `completion`, `text`, or `input` with"
            " `preferred_output` and `non_preferred_output`",
        ),
        (
            '{"text": "a", "prompt": "b"}',
            "must have exactly one of `messages`, `prompt` with `completion`, `text`, or `input` with"
            " `preferred_output` and `non_preferred_output`",
        ),
        ('{"text": ""}', "text: String should have at least 1 character"),
        ('{"prompt": "a"}', "completion: Field required"),
        ('{"messages": []}', "messages: List should have at least 1 item after validation, not 0"),
        ('{"messages": "x"}', "messages: Input should be a valid list"),
        (chat(USER), "messages: no assistant message with a weight other than 0"),
        (
            chat(USER, {**ANSWER, "weight": 0}),
            "messages: no assistant message with a weight other than 0",
        ),
        (
            chat(USER, {**ANSWER, "content": 4}),
            "messages.1.content: Input should be a valid string",
        ),
        (
            chat(USER, {"role": "assistant"}),
            "messages.1.content: must be a string (null only beside tool_calls)",
        ),
        (
            chat({**USER, "weight": 1}, ANSWER),
            "messages.0.weight: only an assistant message has one",
        ),
        (chat(USER, {**ANSWER, "weight": 2}), "messages.1.weight: Input should be 0 or 1"),
        (
            chat(USER, {**ANSWER, "weight": True}),
            "messages.1.weight: must be 0 or 1, not true or false",
        ),
        (chat(USER, {**ANSWER, "mood": 1}), "messages.1.mood: Extra inputs are not permitted"),
        (
            chat({"role": "robot", "content": "x"}, ANSWER),
            "messages.0.role: Input should be 'system', 'user', 'assistant', 'tool' or 'developer'",
        ),
    ],
)
def test_bad_rows_are_refused_with_line_and_field(line, problem) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_row(line, line_number=3)
    assert str(caught.value) == f"training_file line 3: {problem}"
    assert (caught.value.code, caught.value.param) == ("invalid_row", "training_file")


def test_the_error_never_repeats_the_text_of_a_row() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_row('{"messages": "a secret of the row"}', line_number=1)
    assert "secret" not in str(caught.value)


def test_a_file_is_counted_and_its_last_empty_lines_do_not_matter() -> None:
    lines = [chat(USER, ANSWER, USER, ANSWER) + "\n", chat(USER, ANSWER) + "\n", "\n", "  \n"]
    report = check_rows(lines)
    assert report.format is RowFormat.CHAT
    assert (report.num_rows, report.num_learned_turns) == (2, 3)
    assert report.num_bytes == sum(len(line) for line in lines)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"text": "a"}', "", '{"text": "b"}'],
            "validation_file line 2: the line is empty",
        ),
        (
            ['{"text": "a"}', '{"prompt": "b", "completion": "c"}'],
            "validation_file line 2: is a completion row in a file of text rows; use one format",
        ),
        ([], "validation_file: the file has no rows"),
        (["\n"], "validation_file: the file has no rows"),
    ],
)
def test_bad_files_are_refused(lines, message) -> None:
    with pytest.raises(BadRequest) as caught:
        check_rows(lines, param="validation_file")
    assert str(caught.value) == message


def test_an_endless_line_is_never_read_whole() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            buffer[:] = b"a" * len(buffer)
            self.given += len(buffer)
            return len(buffer)

    source = Endless()
    with pytest.raises(BadRequest, match="line 1: longer than"):
        check_rows(read_lines(io.BufferedReader(source)))
    assert source.given < 2 * MAX_LINE_BYTES


@given(st.binary(max_size=60) | st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_row_or_the_one_error(line) -> None:
    assert refusal(line) in (None, "invalid_row")


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=5),
        lambda s: (
            st.lists(s)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "messages",
                        "role",
                        "content",
                        "weight",
                        "text",
                        "prompt",
                        "completion",
                        "tools",
                    ]
                ),
                s,
            )
        ),
    )
)
@settings(max_examples=300, deadline=None)
def test_any_json_gives_a_row_or_the_one_error(value) -> None:
    assert refusal(json.dumps(value)) in (None, "invalid_row")


MC = {"id": "a", "question": "?", "choices": ["x", "y"], "answer": 1}


def test_items_are_checked_by_their_scorer() -> None:
    item = parse_item(json.dumps(MC), Scorer.MULTIPLE_CHOICE, line_number=1)
    assert isinstance(item, MultipleChoiceItem)
    free = parse_item(
        '{"id": "a", "question": "?", "answer": "x", "answers": ["x", "y"]}',
        Scorer.EXACT_MATCH,
        line_number=1,
    )
    assert isinstance(free, ExactMatchItem)
    assert chance_level([item]) == 0.5
    assert chance_level([free]) == 0.0


@pytest.mark.parametrize(
    ("lines", "scorer", "message"),
    [
        ([MC, MC], Scorer.MULTIPLE_CHOICE, "file line 2: id: the same as on line 1"),
        (
            [{**MC, "answer": 2}],
            Scorer.MULTIPLE_CHOICE,
            "file line 1: answer: 2 is not the index of one of the 2 choices",
        ),
        (
            [{**MC, "choices": ["x", " "]}],
            Scorer.MULTIPLE_CHOICE,
            "file line 1: choices.1: must not be empty",
        ),
        ([MC], Scorer.NLL, "file line 1: question: Extra inputs are not permitted"),
        (
            [{"id": "a", "messages": [USER]}],
            Scorer.NLL,
            "file line 1: messages: no assistant message with a weight other than 0",
        ),
        (
            [{"id": "a", "messages": [USER, {"role": "assistant", "content": 1}]}],
            Scorer.NLL,
            "file line 1: messages.1.content: Input should be a valid string",
        ),
        ([], Scorer.NLL, "file: the file has no items"),
    ],
)
def test_bad_benchmark_files_are_refused(lines, scorer, message) -> None:
    with pytest.raises(BadRequest) as caught:
        check_items([json.dumps(line) for line in lines], scorer)
    assert str(caught.value) == message
    assert caught.value.code == "invalid_row"


def test_the_id_digest_depends_on_ids_and_their_order_alone() -> None:
    one, two = {**MC, "id": "a"}, {**MC, "id": "b"}
    digest = {
        key: check_items([json.dumps(i) for i in items], Scorer.MULTIPLE_CHOICE).ids_sha256
        for key, items in {
            "ab": (one, two),
            "ba": (two, one),
            "ab again": ({**one, "question": "other"}, two),
        }.items()
    }
    assert digest["ab"] == digest["ab again"] != digest["ba"]


@needs_data
@pytest.mark.parametrize(
    ("name", "scorer", "num_items"),
    [
        ("arc_easy", Scorer.MULTIPLE_CHOICE, 2376),
        ("truthfulqa_mc1", Scorer.MULTIPLE_CHOICE, 773),
        ("nq_open", Scorer.EXACT_MATCH, 1000),
        ("bbh_gen", Scorer.EXACT_MATCH, 750),
    ],
)
def test_public_benchmarks_parse_unchanged(name, scorer, num_items) -> None:
    with (DATA / "benchmarks" / name / "test.jsonl").open("rb") as file:
        assert check_items(read_lines(file), scorer).num_items == num_items


@needs_data
def test_the_medical_domain_parses_unchanged() -> None:
    with (DATA / "domains/medical_medquad/train.jsonl").open("rb") as file:
        report = check_rows(read_lines(file))
    assert (report.format, report.num_rows) == (RowFormat.CHAT, 6000)
