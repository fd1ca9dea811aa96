"""Preference rows: their shape, what is checked of a file of them, and which jobs may read them."""

import json
from typing import Any

import pytest

from app.domain.conflicts import check_conflicts
from app.domain.conversations import PreferenceRow
from app.domain.data_checks import KnownRows, find_in_file, measure
from app.domain.methods import check_formats, check_stages
from app.domain.overlap import KnownTexts, find_overlaps
from app.domain.rows import RowFormat, check_rows, iter_rows, parse_row
from app.domain.spec import CreateJob
from app.domain.strategies import CARDS
from app.domain.submit import resolve_training
from app.errors import BadRequest
from tests.app.domain.test_conflicts import CONFIGS, surroundings

USER = {"role": "user", "content": "which?"}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def pair(good: str = "this", bad: str = "that", **fields: Any) -> dict[str, Any]:
    return {
        "input": {"messages": [USER]},
        "preferred_output": [said(good)],
        "non_preferred_output": [said(bad)],
    } | fields


def lines(*rows: dict[str, Any]) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def request(**fields: Any) -> CreateJob:
    return CreateJob.model_validate({"model": "m", "training_file": "file-0"} | fields)


def dpo(**numbers: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": numbers}}


def test_each_side_of_a_pair_is_the_conversation_with_that_answer_alone_to_learn() -> None:
    history = [USER, said("earlier"), {"role": "user", "content": "and now?"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    answer = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        said("four"),
    ]
    row = parse_row(
        json.dumps(
            pair(
                input={"messages": history, "tools": tools}, preferred_output=answer, domain="sums"
            )
        ),
        line_number=1,
    )
    assert isinstance(row, PreferenceRow)
    assert [turn.is_learned for turn in row.preferred.messages] == [False] * 3 + [True, False, True]
    assert [turn.content for turn in row.rejected.messages] == [
        "which?",
        "earlier",
        "and now?",
        "that",
    ]
    assert row.preferred.tools == row.rejected.tools == tuple(tools)
    assert row.preferred.domain == "sums"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"input": None},
            "input: Input should be a valid dictionary or instance of PreferenceInput",
        ),
        ({"input": {"messages": []}}, "input.messages: List should have at least 1 item"),
        (
            {"input": {"messages": [USER, said("x")]}},
            "input.messages: the last one is an assistant's",
        ),
        ({"preferred_output": []}, "preferred_output: List should have at least 1 item"),
        ({"non_preferred_output": [USER]}, "non_preferred_output: 0: must be of an assistant"),
        (
            {"preferred_output": [said("x"), {"role": "tool", "content": "y"}]},
            "preferred_output: must begin and end with an assistant message",
        ),
        (
            {"preferred_output": [said("x") | {"weight": 1}]},
            "preferred_output: a preference row has",
        ),
        (
            {"non_preferred_output": [{"role": "assistant"}]},
            "non_preferred_output.0.content: must be",
        ),
        ({"reason": "shorter"}, "reason: Extra inputs are not permitted"),
        ({"messages": [USER, said("x")]}, "must have exactly one of"),
    ],
)
def test_a_bad_pair_is_refused_with_line_and_field(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_row(json.dumps(pair(**fields)), line_number=4, param="file")
    assert str(refused.value).startswith(f"file line 4: {problem}")


def test_a_missing_side_is_named() -> None:
    row = pair()
    del row["non_preferred_output"]
    with pytest.raises(BadRequest, match="line 1: non_preferred_output: Field required"):
        parse_row(json.dumps(row), line_number=1)


def test_a_file_of_pairs_is_counted_and_its_repeated_and_identical_pairs_are_found() -> None:
    rows = [pair(), pair("a", "b"), pair(), pair("x", "x"), pair(" "), pair("long" * 300)]
    report = check_rows(lines(*rows))
    assert (report.format, report.num_rows, report.num_learned_turns) == (
        RowFormat.PREFERENCE,
        6,
        12,
    )
    checks = report.checks
    assert (checks.duplicates.lines, checks.identical_pairs.lines) == ((3,), (4,))
    assert checks.empty_answers.lines == (5,)
    assert (checks.longest_bytes, checks.longest_line) == (6 + 1200, 6)  # the longer side
    both = sum(
        2 * 6
        + len(row["preferred_output"][0]["content"])
        + len(row["non_preferred_output"][0]["content"])
        for row in rows
    )
    assert checks.text_bytes == both  # both sides are read
    measured = measure(
        checks, param="training_file", file="f", num_rows=6, bytes_per_token=1.0, max_seq_length=99
    )
    found = {finding.code: finding for finding in find_in_file(checks, measured, None)}
    assert found["identical_pairs"].lines == (4,)
    assert found["rows_over_length"].lines == (6,)


def test_a_file_that_prefers_nothing_is_refused() -> None:
    with pytest.raises(BadRequest, match="there is nothing to prefer"):
        check_rows(lines(pair("x", "x"), pair("y", "y")))


def test_pairs_and_other_rows_do_not_mix_in_a_file() -> None:
    with pytest.raises(BadRequest, match="line 2: is a text row in a file of preference rows"):
        check_rows(lines(pair(), {"text": "a"}))


def test_pairs_that_are_trained_on_or_repeat_a_benchmark_are_found() -> None:
    training = [row for _, row in iter_rows(lines(pair("good answer"), pair("other")))]
    known = KnownRows(training)
    validation = list(iter_rows(lines(pair("Good answer!"), pair("new"))))
    found = {each.code: each.lines for each in known.find_leaks(validation, "validation_file")}
    assert found == {
        "validation_in_training": (1,),
        "validation_questions_in_training": (2,),
    }
    item = "this is the rejected answer that a benchmark asks for by name"
    overlaps = find_overlaps(
        iter_rows(lines(pair(), pair("fine", item))), {"mmlu": KnownTexts([item])}
    )
    assert overlaps == {"mmlu": [2]}


@pytest.mark.parametrize(
    ("method", "formats", "param", "words"),
    [
        (None, {"training_file": "preference"}, "training_file", "set method.type to 'dpo'"),
        (dpo(), {"training_file": "chat"}, "training_file", "format 'chat'"),
        (
            dpo(),
            {"training_file": "preference", "validation_file": "text"},
            "validation_file",
            "preferred_output",
        ),
        (
            dpo(),
            {"training_file": "preference", "retention.general_data": "preference"},
            "retention.general_data",
            "general data are rows that show them",
        ),
    ],
)
def test_a_file_of_the_other_method_is_refused(
    method: Any, formats: dict[str, str], param: str, words: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        check_formats(request(method=method), formats)
    assert (refused.value.param, refused.value.code) == (param, "wrong_row_format")
    assert words in refused.value.message


def test_files_of_the_method_are_taken() -> None:
    check_formats(
        request(method=dpo()), {"training_file": "preference", "retention.general_data": "chat"}
    )
    check_formats(request(), {"training_file": "chat", "retention.general_data": "text"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stages": [{"name": "a"}]}, "stages"), ({"preset": "roadmap"}, "preset")],
)
def test_stages_of_pairs_are_refused(fields: dict[str, Any], param: str) -> None:
    check_stages(request(**fields))
    with pytest.raises(BadRequest, match="one stage") as refused:
        check_stages(request(method=dpo(), **fields))
    assert refused.value.param == param


@pytest.mark.parametrize("kind", sorted(CARDS.keys() - {"si"}))  # it needs stages
def test_a_strategy_that_cannot_read_pairs_is_refused_with_the_reason(kind: str) -> None:
    around: dict[str, Any] = {"lora": kind == "domain_adapters", "stage_names": ()}
    strategies = CONFIGS.validate_python([{"type": kind}])
    check_conflicts(strategies, surroundings(**around))
    if kind in {"maml_prox", "reptile", "causal"}:
        with pytest.raises(BadRequest, match="can't go with method") as refused:
            check_conflicts(strategies, surroundings(compares=True, **around))
        assert refused.value.code == "conflicting_strategies"
        assert refused.value.param == "retention.strategies.0"
    else:
        check_conflicts(strategies, surroundings(compares=True, **around))


@pytest.mark.parametrize(
    ("kind", "method", "rate", "beta"),
    [
        ("lora", None, 2e-4, None),
        ("lora", dpo(), 2e-5, 0.1),
        ("full", dpo(beta=0.5), 2e-6, 0.5),
        ("full", dpo(beta="auto", learning_rate_multiplier=3), 6e-6, 0.1),
    ],
)
def test_beta_and_rate_are_resolved(
    kind: str, method: Any, rate: float, beta: float | None
) -> None:
    asked = request(method=method, training={"type": kind})
    found = resolve_training(asked, num_rows=10, context_length=None, seed=0)
    assert found.learning_rate == pytest.approx(rate)
    assert found.beta == beta
