"""Rows of other tools' layouts (ShareGPT, Alpaca) as chat rows, and which columns of a table make rows."""

import json
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any, Final


class Layout(StrEnum):
    """How a file's rows are written before anything is done to them."""

    NATIVE = "native"  # what training reads (`app.domain.rows.RowFormat`): taken as they are
    SHAREGPT = "sharegpt"  # {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    ALPACA = "alpaca"  # {"instruction", "input"?, "output", "system"?, "history"?}


class NotConvertible(ValueError):
    """Why one row cannot become a chat row."""


#: Keys that make rows, and the optional ones beside them; what else a table has is left out.
COLUMNS: Final[tuple[tuple[frozenset[str], frozenset[str]], ...]] = (
    (
        frozenset({"messages"}),
        frozenset({"tools", "parallel_tool_calls", "domain", "counterfactual"}),
    ),
    (frozenset({"conversations"}), frozenset({"system", "tools"})),
    (frozenset({"instruction", "output"}), frozenset({"input", "system", "history"})),
    (frozenset({"prompt", "completion"}), frozenset({"domain", "counterfactual"})),
    (frozenset({"text"}), frozenset({"domain", "counterfactual"})),
    (frozenset({"input", "preferred_output", "non_preferred_output"}), frozenset({"domain"})),
)

ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
}
CALL: Final = "function_call"  # a turn that is a call, as LLaMA-Factory writes it


def choose_columns(names: Collection[str]) -> list[str] | None:
    """The columns of a table that make training rows, in the table's order; None when there are none."""
    have = set(names)
    for needed, optional in COLUMNS:
        if needed <= have:
            return [name for name in names if name in needed or name in optional]
    return None


def find_layout(row: Mapping[str, Any]) -> Layout:
    """The layout that a file's first row is written in."""
    if "conversations" in row:
        return Layout.SHAREGPT
    if "instruction" in row and "output" in row:
        return Layout.ALPACA
    return Layout.NATIVE


def convert_row(row: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A row of this layout as one that training reads.

    Raises:
        NotConvertible: It has not the layout's shape; the text names the field and never quotes it.
    """
    match layout:
        case Layout.SHAREGPT:
            return _from_sharegpt(row)
        case Layout.ALPACA:
            return _from_alpaca(row)
        case Layout.NATIVE:
            return _tidy(row)


def _from_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise NotConvertible("conversations: must be a list of turns")
    messages: list[dict[str, Any]] = []
    system = _optional_text(row, "system")
    if system:
        messages.append({"role": "system", "content": system})
    for place, turn in enumerate(turns):
        messages.append(_sharegpt_turn(turn, f"conversations.{place}"))
    found: dict[str, Any] = {"messages": messages}
    tools = _tools(row.get("tools"))
    return found | ({"tools": tools} if tools else {})


def _sharegpt_turn(turn: object, path: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise NotConvertible(f"{path}: must be an object with `from` and `value`")
    sender = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if not isinstance(sender, str) or not isinstance(text, str):
        raise NotConvertible(f"{path}: `from` and `value` must be strings")
    if sender == CALL:
        return {"role": "assistant", "tool_calls": [_call(text, path)]}
    role = ROLES.get(sender.lower())
    if role is None:
        raise NotConvertible(f"{path}.from: no known speaker")
    if not text.strip():
        raise NotConvertible(f"{path}.value: is empty")
    message: dict[str, Any] = {"role": role, "content": text}
    weight = turn.get("weight")
    if role == "assistant" and weight is not None:
        message["weight"] = weight
    return message


def _call(text: str, path: str) -> dict[str, Any]:
    call = _parse(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise NotConvertible(f"{path}.value: must be JSON with `name` and `arguments`")
    return {"function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _from_alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    instruction, answer = row.get("instruction"), row.get("output")
    if not isinstance(instruction, str) or not instruction.strip():
        raise NotConvertible("instruction: must be a string that is not empty")
    if not isinstance(answer, str) or not answer.strip():
        raise NotConvertible("output: must be a string that is not empty")
    material, system = _optional_text(row, "input"), _optional_text(row, "system")
    messages = [{"role": "system", "content": system}] if system else []
    messages += _history(row.get("history"))
    question = f"{instruction}\n\n{material}" if material else instruction
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _history(rounds: object) -> list[dict[str, str]]:
    messages = []
    for place, pair in enumerate(rounds if isinstance(rounds, list) else []):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(text, str) and text.strip() for text in pair)
        ):
            raise NotConvertible(f"history.{place}: must be a question and its answer")
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return messages


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    text = row.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise NotConvertible(f"{key}: must be a string")
    return text if text.strip() else ""


def _tools(value: object) -> list[Any]:
    tools = _parse(value) if isinstance(value, str) and value.strip() else value
    if tools in (None, ""):
        return []
    if not isinstance(tools, list):
        raise NotConvertible("tools: must be a list, or its JSON")
    return tools


def _tidy(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table: its empty cells left out, tools that are JSON text read."""
    found = {key: _without_nulls(value) for key, value in row.items() if value is not None}
    if "tools" in found:
        tools = _tools(found.pop("tools"))
        found |= {"tools": tools} if tools else {}
    return found


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
