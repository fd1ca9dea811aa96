"""Rows of other tools become chat rows, or say why not."""

import json
from typing import Any

import pytest

from app.domain.conversations import ChatRow
from app.domain.foreign import Layout, NotConvertible, choose_columns, convert_row, find_layout
from app.domain.preview import LISTED_DROPS, LISTED_REASONS, Tally, shorten
from app.domain.rows import parse_row

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def as_chat(row: dict[str, Any]) -> ChatRow:
    converted = convert_row(row, find_layout(row))
    parsed = parse_row(json.dumps(converted), line_number=1)
    assert isinstance(parsed, ChatRow)
    return parsed


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"conversations": TURNS}, [("user", "q"), ("assistant", "a")]),
        (
            {"conversations": TURNS, "system": "s", "id": "1"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"from": "GPT", "value": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": " ", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        (
            {"instruction": "i", "input": "m", "output": "o", "text": "Below is an instruction"},
            [("user", "i\n\nm"), ("assistant", "o")],
        ),
        (
            {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "i"), ("assistant", "o")],
        ),
    ],
)
def test_turns_keep_their_speakers_and_order(
    row: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    assert [(turn.role, turn.content) for turn in as_chat(row).messages] == turns


def test_calls_observations_and_tools_come_along() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    }
    chat = as_chat(row)
    assert [turn.role for turn in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1].tool_calls is not None
    assert chat.messages[1].tool_calls[0].function.arguments == {"x": 1}
    assert chat.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"conversations": []}, "conversations: must be"),
        ({"conversations": ["x"]}, "conversations.0: must be"),
        ({"conversations": [{"from": "human"}]}, "conversations.0: `from`"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations.0.from: no known"),
        ({"conversations": [*TURNS, {"from": "gpt", "value": " "}]}, "conversations.2.value"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "must be JSON"),
        ({"conversations": TURNS, "system": 3}, "system: must be"),
        ({"conversations": TURNS, "tools": "{}"}, "tools: must be"),
        ({"instruction": "", "output": "o"}, "instruction: must be"),
        ({"instruction": "i", "output": None}, "output: must be"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "history.0"),
    ],
)
def test_what_cannot_be_converted_names_its_field(row: dict[str, Any], word: str) -> None:
    with pytest.raises(NotConvertible, match=word.replace(".", r"\.")):
        convert_row(row, find_layout(row))


def test_empty_cells_of_a_table_are_left_out() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q", "weight": None, "tool_calls": None},
            {"role": "assistant", "content": "a", "weight": None, "tool_calls": None},
        ],
        "tools": None,
    }
    assert find_layout(row) is Layout.NATIVE
    assert len(as_chat(row).messages) == 2


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["id", "messages", "prompt", "score"], ["messages"]),
        (["output", "instruction", "input", "text"], ["output", "instruction", "input"]),
        (["conversations", "id", "system"], ["conversations", "system"]),
        (["prompt", "completion", "source"], ["prompt", "completion"]),
        (["url", "text"], ["text"]),
        (["prompt", "chosen", "rejected"], None),
        ([], None),
    ],
)
def test_columns_are_chosen(names: list[str], chosen: list[str] | None) -> None:
    assert choose_columns(names) == chosen


def test_a_tally_is_bounded_and_counts_all() -> None:
    tally = Tally()
    for line in range(1000):
        tally.drop(line, f"conversations.{line}.value: is empty")
    for line in range(50):
        tally.drop(line, f"reason {line}")
    for _ in range(10):
        tally.keep({"text": "x" * 10_000})
    assert (tally.num_read, tally.num_kept, tally.num_dropped) == (1060, 10, 1050)
    assert len(tally.dropped) == LISTED_DROPS
    assert tally.reasons["conversations.*.value: is empty"] == 1000
    assert len(tally.reasons) <= LISTED_REASONS
    assert len(tally.preview) == 3
    assert len(tally.preview[0]["text"]) == 501
    assert shorten([1] * 100) == [1] * 20
