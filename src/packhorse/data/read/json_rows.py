"""Read JSON with one row per line, and refuse what Python's own reader accepts but other readers do not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from packhorse.data.read.row import Row, RowMistakes, broken_row, shown
from packhorse.data.read.streams import line_blocks
from packhorse.errors import Mistake

MOST_LEVELS: Final = 64
"""Nested objects and lists in a row; far more than a chat needs, far fewer than later readers of the row can take."""
WHITESPACE: Final = " \t\r\n"
SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE_BYTES: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_jsonl(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    r"""Yield the row of each line; lines end at `\n` only, and blank lines are skipped.

    Raises:
        UserError: The file cannot be read to its end.
    """
    name = str(path)
    for first, block in line_blocks(path):
        # One search per block: a search in each line would cost as much as decoding it.
        escapes = SURROGATE_BYTES.search(block) is not None
        # Split as bytes: str.splitlines() would also split inside a row, at U+2028.
        for number, line in enumerate(block.split(b"\n"), first):
            try:
                text = line.decode()
                begin = 0 if text[:1] == "{" else len(text) - len(text.lstrip(WHITESPACE))
                if begin == len(text):
                    continue
                values, end = scan(text, begin)
                if end != len(text) and text[end:].strip(WHITESPACE):
                    raise json.JSONDecodeError("Extra data", text, end)
                check(values, text, begin, end, escapes)
            except UnicodeDecodeError as error:
                decoded = line.decode(errors="replace")
                mistakes.add(broken_row(f"{name}:{number}", "the line is not UTF-8", error, decoded))
            except (ValueError, RecursionError) as error:
                mistakes.add(broken_row(f"{name}:{number}", "the line is not JSON", error, text))
            else:
                if isinstance(values, dict):
                    yield Row(f"{name}:{number}", values)
                else:
                    mistakes.add(not_an_object(values, f"{name}:{number}", text))


def scan(text: str, at: int) -> tuple[Any, int]:
    """Return the value that begins at `text[at]`, and the position after it.

    Raises:
        ValueError: Not JSON, NaN, or a number too large for a float; JSONDecodeError where the position is known.
        RecursionError: Nested a thousand levels deep.
    """
    return DECODER.raw_decode(text, at)


def check(values: object, text: str, at: int, end: int, escapes: bool) -> None:
    """Refuse a row that Python reads but other readers refuse or read differently.

    Args:
        values: Value of `text[at:end]`.
        text: Text that holds the row.
        at: Position of its first character.
        end: Position after its last character.
        escapes: Whether the text may hold escaped surrogates.

    Raises:
        ValueError: A key is twice in an object (the last one would win), half a surrogate pair, or nested too deeply.
    """
    if not isinstance(values, dict):
        return
    # A colon follows each key, so there are more colons than keys left if a key was there twice. Texts may hold `":`
    # too: in that case the slower reader, which checks each object, decides.
    if text.count('":', at, end) != _num_keys(values, MOST_LEVELS):
        STRICT_DECODER.raw_decode(text, at)
    if escapes and SURROGATE.search(text, at, end):
        _refuse_half_pairs(values)


def decode(text: str) -> Any:  # noqa: ANN401  # JSON
    """Return the value of a JSON text that is part of a row.

    Raises:
        ValueError: Not JSON, or what `check` refuses in a row.
        RecursionError: Nested a thousand levels deep.
    """
    value = STRICT_DECODER.decode(text)
    if isinstance(value, dict | list):
        _num_keys(value, MOST_LEVELS)
    if SURROGATE.search(text):
        _refuse_half_pairs(value)
    return value


def not_an_object(value: object, where: str, text: str) -> Mistake:
    """Return the mistake of a row that is not an object."""
    return Mistake(
        f"the row is not a JSON object but {type(value).__name__}; it begins {shown(text)}",
        "a row has named fields, such as messages.",
        'write it as {"messages": […]} or in another known format.',
        where,
    )


def _num_keys(value: Any, levels: int) -> int:  # noqa: ANN401
    if levels == 0:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
    if value.__class__ is dict:
        count, inner = len(value), value.values()
    else:
        count, inner = 0, value
    for one in inner:
        # `isinstance` with two types, for each turn of a chat, would cost as much as reading the row.
        kind = one.__class__
        if kind is dict or kind is list:
            count += _num_keys(one, levels - 1)
    return count


def _refuse_half_pairs(values: object) -> None:
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"half a surrogate pair ({half}), which is not a character") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"the key {shown(twice)} is twice in one object")
    return values


DECODER: Final = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
STRICT_DECODER: Final = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique_keys
)
