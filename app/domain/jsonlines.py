"""JSON Lines from outside: one strict object a line, read without ever holding more than one line."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from app.errors import BadRequest

MAX_LINE_BYTES: Final = 2**20
MAX_LINES: Final = 5_000_000
MAX_DEPTH: Final = 32
MAX_INT_DIGITS: Final = 18  # every such number fits 64 bits
INVALID_ROW: Final = "invalid_row"

Model = TypeVar("Model", bound=BaseModel)

_STARTS_WITH_FIELD = re.compile(r"[a-z_]+: ")


class LineFault(ValueError):
    """What is wrong with a line, before its file and number are known."""


def refuse_line(param: str, line_number: int, problem: str) -> NoReturn:
    """Raises the error of one bad line.

    Args:
        param: The request field that named the file.
        line_number: Counted from 1.
        problem: What is wrong, with the field's path in front where there is one.

    Raises:
        BadRequest: Always, with code `invalid_row`.
    """
    raise BadRequest(f"{param} line {line_number}: {problem}", param, INVALID_ROW)


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file; a longer one than allowed comes cut, so that memory stays bounded."""
    while line := file.readline(MAX_LINE_BYTES + 2):
        yield line
        if len(line) == MAX_LINE_BYTES + 2 and not line.endswith(b"\n"):
            return  # whoever checks lines refuses this one, so what follows does not matter


def number_lines(lines: Iterable[bytes | str], *, param: str) -> Iterator[tuple[int, bytes | str]]:
    """Each line with its number from 1; empty ones are allowed at the end of the file alone.

    Raises:
        BadRequest: An empty line before another, or more than `MAX_LINES`.
    """
    empty: int | None = None
    for number, line in enumerate(lines, start=1):
        if number > MAX_LINES:
            raise BadRequest(f"{param}: more than {MAX_LINES:,} lines", param, INVALID_ROW)
        if not line.strip():
            empty = empty or number
            continue
        if empty is not None:
            refuse_line(param, empty, "the line is empty")
        yield number, line


def parse_object(line: bytes | str, *, line_number: int, param: str) -> dict[str, Any]:
    """The JSON object on a line.

    Refused: bytes that are not UTF-8, more than 1 MiB, keys given twice, NaN and Infinity, integers past
    64 bits, floats past the range, NUL characters, lone surrogates, nesting deeper than 32.

    Raises:
        BadRequest: The line is none, with code `invalid_row`.
    """
    try:
        return _parse(line)
    except LineFault as fault:
        refuse_line(param, line_number, str(fault))


def describe_invalid(error: ValidationError) -> str:
    """Path and text of the first thing that a model refused; never the value itself."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    text = first["msg"].replace("valid tuple", "valid list").replace("Tuple should", "List should")
    text = text.removeprefix("Value error, ")
    if first["type"] == "value_error" and _STARTS_WITH_FIELD.match(text):
        return f"{path}.{text}" if path else text  # from a check of a whole object
    return f"{path}: {text}" if path else text


def validate_line(
    model: type[Model], value: dict[str, Any], *, line_number: int, param: str
) -> Model:
    """A line's object as a model.

    Raises:
        BadRequest: It is not one; the message names the field.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        refuse_line(param, line_number, describe_invalid(error))


def _parse(line: bytes | str) -> dict[str, Any]:
    text = _decode(line)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise LineFault(
            f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from None
    except RecursionError:
        raise LineFault(f"nested deeper than {MAX_DEPTH}") from None
    if not isinstance(value, dict):
        raise LineFault("must be a JSON object")
    # Escapes are the only way for NUL and surrogates into text that decoded as UTF-8.
    if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_value(value, 1)
    return value


def _decode(line: bytes | str) -> str:
    if isinstance(line, str):
        try:
            raw = line.encode()
        except UnicodeEncodeError:
            raise LineFault("holds a lone surrogate") from None
    else:
        raw = line
    if len(raw.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise LineFault(f"longer than {MAX_LINE_BYTES:,} bytes")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise LineFault("starts with a byte order mark; save the file as UTF-8 without one")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise LineFault(f"not UTF-8: byte {error.start + 1} is invalid") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise LineFault(f"the key {json.dumps(key[:80])} occurs twice")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise LineFault(f"{name} is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INT_DIGITS:
        raise LineFault(f"an integer of more than {MAX_INT_DIGITS} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise LineFault("a number past the range of a double")
    return value


def _check_value(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise LineFault(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        if "\0" in value:
            raise LineFault("holds a NUL character")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise LineFault("holds a lone surrogate")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_value(key, depth)
            _check_value(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_value(inner, depth + 1)
