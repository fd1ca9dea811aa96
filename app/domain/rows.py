"""Training rows and benchmark items as they arrive in files: their shapes, and the check of a file."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Final

from pydantic import Field, ValidationError

from app.domain.benchmarks import (
    ITEM_TYPES,
    ExactMatchItem,
    MultipleChoiceItem,
    NllItem,
    Scorer,
    Subjects,
    collect_subjects,
    item_id,
)
from app.domain.conversations import ChatRow, Environment, Message, PreferenceRow
from app.domain.frozen import Frozen
from app.domain.jsonlines import (
    INVALID_ROW,
    describe_invalid,
    number_lines,
    parse_object,
    refuse_line,
    validate_line,
)
from app.domain.row_checks import RowChecks, RowTally
from app.errors import BadRequest

TRAINING_FILE: Final = "training_file"


class RowFormat(StrEnum):
    """How the rows of a file are written; one format a file."""

    CHAT = "chat"  # {"messages": [...], "tools"?: [...]}; assistant turns are learned
    COMPLETION = "completion"  # {"prompt", "completion"}; the completion is learned
    TEXT = "text"  # {"text"}; every token is learned
    PREFERENCE = "preference"  # {"input", "preferred_output", "non_preferred_output"}: for `dpo`


class CompletionContent(Frozen):
    """A prompt, taken as it stands, and what should follow it."""

    prompt: str
    completion: str = Field(min_length=1)


class TextContent(Frozen):
    """Plain text for continued pre-training."""

    text: str = Field(min_length=1)


class CompletionRow(CompletionContent):
    """A prompt and its completion, with what strategies may read of it."""

    counterfactual: CompletionContent | None = None
    domain: Environment | None = None


class TextRow(TextContent):
    """A text, with what strategies may read of it."""

    counterfactual: TextContent | None = None
    domain: Environment | None = None


Row = ChatRow | CompletionRow | TextRow | PreferenceRow
Item = MultipleChoiceItem | ExactMatchItem | NllItem

ROW_TYPES: Final[
    dict[RowFormat, type[ChatRow] | type[CompletionRow] | type[TextRow] | type[PreferenceRow]]
] = {
    RowFormat.CHAT: ChatRow,
    RowFormat.COMPLETION: CompletionRow,
    RowFormat.TEXT: TextRow,
    RowFormat.PREFERENCE: PreferenceRow,
}


class RowsReport(Frozen):
    """What a checked file of training rows holds."""

    format: RowFormat
    num_rows: int
    num_bytes: int
    num_learned_turns: int  # assistant turns in the loss; for prompts and texts the rows
    checks: RowChecks


class ItemsReport(Frozen):
    """What a checked benchmark file holds; `ids_sha256` covers the ids in file order."""

    scorer: Scorer
    num_items: int
    num_bytes: int
    ids_sha256: str
    chance_level: float
    subjects: Subjects | None = None


def counterpart(row: Row) -> Row | None:
    """The counterfactual that a row carries, as a row of its own."""
    if isinstance(row, PreferenceRow) or row.counterfactual is None:
        return None
    return type(row).model_construct(**dict(row.counterfactual))


def row_format(row: Row) -> RowFormat:
    """The format a row is written in."""
    if isinstance(row, ChatRow):
        return RowFormat.CHAT
    if isinstance(row, PreferenceRow):
        return RowFormat.PREFERENCE
    return RowFormat.COMPLETION if isinstance(row, CompletionRow) else RowFormat.TEXT


def parse_row(line: bytes | str, *, line_number: int, param: str = TRAINING_FILE) -> Row:
    """One line of a file of training rows.

    Args:
        line: With or without its line break.
        line_number: Counted from 1.
        param: The request field that named the file.

    Raises:
        BadRequest: With code `invalid_row`; `training_file line 3: messages.1.content: ...`.
    """
    value = parse_object(line, line_number=line_number, param=param)
    kinds = [
        kind
        for kind, keys in (
            (RowFormat.CHAT, ("messages",)),
            (RowFormat.COMPLETION, ("prompt", "completion")),
            (RowFormat.TEXT, ("text",)),
            (RowFormat.PREFERENCE, ("input", "preferred_output", "non_preferred_output")),
        )
        if any(key in value for key in keys)
    ]
    if len(kinds) != 1:
        refuse_line(
            param,
            line_number,
            "must have exactly one of `messages`, `prompt` with `completion`, `text`, or `input` with"
            " `preferred_output` and `non_preferred_output`",
        )
    return validate_line(ROW_TYPES[kinds[0]], value, line_number=line_number, param=param)


def iter_rows(
    lines: Iterable[bytes | str], *, param: str = TRAINING_FILE
) -> Iterator[tuple[int, Row]]:
    """Each row of a file with its line number.

    Raises:
        BadRequest: A bad line, or one in another format than the first.
    """
    wanted: RowFormat | None = None
    for number, line in number_lines(lines, param=param):
        row = parse_row(line, line_number=number, param=param)
        found = row_format(row)
        if wanted is not None and found is not wanted:
            refuse_line(
                param, number, f"is a {found} row in a file of {wanted} rows; use one format"
            )
        wanted = found
        yield number, row


def check_rows(lines: Iterable[bytes | str], *, param: str = TRAINING_FILE) -> RowsReport:
    """Reads a whole file of training rows, one line at a time.

    Raises:
        BadRequest: The first bad line, no line at all, or no answer in any.
    """
    num_rows = num_turns = 0
    found: RowFormat | None = None
    counted = _Counted(lines)
    tally = RowTally()
    for line, row in iter_rows(counted, param=param):
        num_rows += 1
        found = row_format(row)
        _take_row(tally, line, row)
        num_turns += _count_turns(row)
    if found is None:
        raise BadRequest(f"{param}: the file has no rows", param, INVALID_ROW)
    checks = tally.finish()
    if checks.identical_pairs.count == num_rows:
        raise BadRequest(
            f"{param}: there is nothing to prefer: in every row preferred_output and non_preferred_output are"
            " the same",
            param,
            INVALID_ROW,
        )
    if checks.empty_answers.count == num_rows:
        listed = ", ".join(map(str, checks.empty_answers.lines))
        raise BadRequest(
            f"{param}: there is nothing to learn: every answer is white space (lines {listed}"
            f"{', ...' if num_rows > len(checks.empty_answers.lines) else ''})",
            param,
            INVALID_ROW,
        )
    return RowsReport(
        format=found,
        num_rows=num_rows,
        num_bytes=counted.num_bytes,
        num_learned_turns=num_turns,
        checks=checks,
    )


def _count_turns(row: Row) -> int:
    if isinstance(row, PreferenceRow):
        return sum(m.is_learned for m in (*row.preferred_output, *row.non_preferred_output))
    return sum(m.is_learned for m in row.messages) if isinstance(row, ChatRow) else 1


def _take_row(tally: RowTally, line: int, row: Row) -> None:
    if isinstance(row, PreferenceRow):
        _take_pair(tally, line, row)
        return
    if isinstance(row, ChatRow):
        texts = [message.content or "" for message in row.messages]
        is_empty = _has_empty_answer(row.messages)
        key: object = (_turns_key(row.messages), repr(row.tools))
    elif isinstance(row, CompletionRow):
        texts, is_empty = [row.prompt, row.completion], not row.completion.strip()
        key = (row.prompt, row.completion)
    else:
        texts, is_empty, key = [row.text], not row.text.strip(), row.text
    tally.take(line, key=key, size_bytes=sum(map(text_bytes, texts)), has_empty_answer=is_empty)


def _take_pair(tally: RowTally, line: int, row: PreferenceRow) -> None:
    """A pair is as long as the longer of its sides, and both are read."""
    sides = row.preferred_output, row.non_preferred_output
    keys = [_turns_key(side) for side in sides]
    asked = sum(text_bytes(turn.content or "") for turn in row.input.messages)
    answers = [sum(text_bytes(turn.content or "") for turn in side) for side in sides]
    tally.take(
        line,
        key=(_turns_key(row.input.messages), repr(row.input.tools), *keys),
        size_bytes=asked + max(answers),
        has_empty_answer=_has_empty_answer(row.preferred_output),
        read_bytes=2 * asked + sum(answers),
        is_identical=keys[0] == keys[1],
    )


def _has_empty_answer(turns: Iterable[Message]) -> bool:
    return any(
        turn.is_learned and not turn.tool_calls and not (turn.content or "").strip()
        for turn in turns
    )


def _turns_key(turns: Sequence[Message]) -> object:
    return (
        tuple((turn.role, turn.content, turn.weight) for turn in turns),
        repr([turn.tool_calls for turn in turns if turn.tool_calls]),
    )


def text_bytes(text: str) -> int:
    """Of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def parse_item(line: bytes | str, scorer: Scorer, *, line_number: int, param: str = "file") -> Item:
    """One line of a benchmark file; an item without an id gets that of its contents.

    Raises:
        BadRequest: With code `invalid_row`; the message names line and field.
    """
    value = parse_object(line, line_number=line_number, param=param)
    value = {"id": item_id(value)} | value
    item = validate_line(ITEM_TYPES[scorer], value, line_number=line_number, param=param)
    if isinstance(item, MultipleChoiceItem) and not all(c.strip() for c in item.choices):
        empty = next(i for i, choice in enumerate(item.choices) if not choice.strip())
        refuse_line(param, line_number, f"choices.{empty}: must not be empty")
    if isinstance(item, NllItem) and item.messages is not None:
        try:
            ChatRow.model_validate({"messages": item.messages})
        except ValidationError as error:
            refuse_line(param, line_number, describe_invalid(error))
    return item


def iter_items(
    lines: Iterable[bytes | str], scorer: Scorer, *, param: str = "file"
) -> Iterator[tuple[int, Item]]:
    """Each item of a benchmark file with its line number.

    Raises:
        BadRequest: A bad line, or an id that occurred before.
    """
    first_line: dict[str, int] = {}
    for number, line in number_lines(lines, param=param):
        item = parse_item(line, scorer, line_number=number, param=param)
        earlier = first_line.setdefault(item.id, number)
        if earlier != number:
            refuse_line(param, number, f"id: the same as on line {earlier}")
        yield number, item


def check_items(
    lines: Iterable[bytes | str], scorer: Scorer, *, param: str = "file"
) -> ItemsReport:
    """Reads a whole benchmark file, one line at a time.

    Raises:
        BadRequest: The first bad line, an id that occurs twice, or no line at all.
    """
    digest = hashlib.sha256()
    counted = _Counted(lines)
    num_items, chance = 0, 0.0
    subjects: list[str | None] = []
    for _, item in iter_items(counted, scorer, param=param):
        num_items += 1
        subjects.append(item.subject)
        chance += _item_chance(item)
        digest.update(json.dumps(item.id).encode() + b"\n")
    if not num_items:
        raise BadRequest(f"{param}: the file has no items", param, INVALID_ROW)
    return ItemsReport(
        scorer=scorer,
        num_items=num_items,
        num_bytes=counted.num_bytes,
        ids_sha256=digest.hexdigest(),
        chance_level=chance / num_items,
        subjects=collect_subjects(subjects),
    )


def chance_level(items: Iterable[Item]) -> float:
    """Mean score of blind guessing: the mean of 1 / number of choices; 0 for the other scorers."""
    chances = [_item_chance(item) for item in items]
    return sum(chances) / len(chances) if chances else 0.0


def _item_chance(item: Item) -> float:
    return 1 / len(item.choices) if isinstance(item, MultipleChoiceItem) else 0.0


class _Counted:
    """Passes lines on and counts their bytes."""

    def __init__(self, lines: Iterable[bytes | str]) -> None:
        self._lines = lines
        self.num_bytes = 0

    def __iter__(self) -> Iterator[bytes | str]:
        for line in self._lines:
            self.num_bytes += len(line) if isinstance(line, bytes) else len(line.encode())
            yield line
