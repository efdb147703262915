"""Rows of JSON, one a line: strict where Python's own reader is lenient."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from packhorse.data.read.broken import broken_row, shown
from packhorse.data.read.mistakes import RowMistakes
from packhorse.data.read.row import Row
from packhorse.data.read.streams import line_blocks
from packhorse.errors import Mistake

MOST_LEVELS: Final = 64
"""Of objects and lists inside each other; far above any chat, far below where a later reader of the row would fail."""
WHITESPACE: Final = " \t\r\n"
SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE_BYTES: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def read_jsonl(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    r"""Yield the row of each line; lines end at `\n` alone, and blank ones are passed over.

    Raises:
        UserError: The file cannot be read to its end.
    """
    name = str(path)
    for first, block in line_blocks(path):
        # One look at the whole block: a look at each line would cost as much as its decoding.
        escapes = SURROGATE_BYTES.search(block) is not None
        # Bytes are split: str.splitlines() would also split inside a row, at U+2028.
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
                mistakes.add(broken_row(f"{name}:{number}", "the line is no UTF-8", error, decoded))
            except (ValueError, RecursionError) as error:
                mistakes.add(broken_row(f"{name}:{number}", "the line is no JSON", error, text))
            else:
                if isinstance(values, dict):
                    yield Row(f"{name}:{number}", values)
                else:
                    mistakes.add(no_object(values, f"{name}:{number}", text))


def scan(text: str, at: int) -> tuple[Any, int]:
    """Return the value that begins at a place of a text, and the place where it ends.

    Raises:
        ValueError: No JSON, NaN, or a number that a float cannot hold; JSONDecodeError where the place is known.
        RecursionError: Nested a thousand levels deep.
    """
    return DECODER.raw_decode(text, at)


def check(values: object, text: str, at: int, end: int, escapes: bool) -> None:
    """Refuse what Python reads and others do not, or read otherwise.

    Args:
        values: What was read from `text[at:end]`.
        text: Where it was read.
        at: Its first character.
        end: The character after its last.
        escapes: The text may hold escaped surrogates.

    Raises:
        ValueError: A key stands twice in an object, of which the last would win; half a surrogate pair; too deep.
    """
    if not isinstance(values, dict):
        return
    # Each key is followed by a colon, so fewer keys than that are left of more only if one stood there twice. Texts
    # may hold `":` too: then the slower reader, which looks at each object, decides.
    if text.count('":', at, end) != _num_keys(values, MOST_LEVELS):
        STRICT_DECODER.raw_decode(text, at)
    if escapes and SURROGATE.search(text, at, end):
        _refuse_half_pairs(values)


def no_object(value: object, where: str, text: str) -> Mistake:
    """Return the mistake of a row that is no object."""
    return Mistake(
        f"the row is no JSON object but {type(value).__name__}; it begins {shown(text)}",
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
        # As `isinstance` with two types, the look at each turn of a chat would cost as much as reading it.
        kind = one.__class__
        if kind is dict or kind is list:
            count += _num_keys(one, levels - 1)
    return count


def _refuse_half_pairs(values: dict[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"half a surrogate pair ({half}), which is no character") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return values


DECODER: Final = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
STRICT_DECODER: Final = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_with_each_key_once
)
