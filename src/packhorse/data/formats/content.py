"""Get the text of a row that becomes tokens, and the plain fields next to it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names, shown

PLAIN: Final = (str, int, float)  # a bool is an int
Fields = dict[str, str | int | float | bool]


def text_of(value: object, name: str) -> str:
    """Return text, or the joined texts of content parts.

    Args:
        value: Value in the row.
        name: Name of the value in a message, such as `content of turn 2`.

    Raises:
        BadRowError: The value is neither, or holds half a surrogate pair.
    """
    if isinstance(value, str):
        # ASCII text, which Python knows without a search, has no surrogates: most rows cost nothing here.
        if not value.isascii():
            check_characters(value, name)
        return value
    if isinstance(value, list):
        return "".join([_part(part, name) for part in value])
    raise BadRowError(
        f"{name} is {'null' if value is None else type(value).__name__}, not text.",
        "only text becomes tokens.",
        "write it as text in double quotes.",
    )


def check_characters(text: str, name: str) -> None:
    """Raise BadRowError for text with half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{name} has half a surrogate pair ({text[error.start]!a}) at character {error.start}.",
            "it is not a character, and no tokenizer accepts it.",
            "write the whole pair, or remove it.",
        ) from error


def other_fields(values: dict[str, Any], keys: Container[str]) -> Fields:
    """Return the row's plain values whose names are not keys of its format.

    Raises:
        BadRowError: A name or a text has half a surrogate pair.
    """
    fields = {key: value for key, value in values.items() if key not in keys and isinstance(value, PLAIN)}
    for key, value in fields.items():
        if not key.isascii():
            check_characters(key, f"the name of the field {names([key])}")
        if isinstance(value, str) and not value.isascii():
            check_characters(value, names([key]))
    return fields


def _part(part: object, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        word = kind if isinstance(kind, str) and kind.isidentifier() else shown(kind)
        raise BadRowError(f"{name} has a part of type {word}.", "only text becomes tokens.", "keep only text parts.")
    text = part.get("text", part.get("value"))
    # A list is refused here: parts have no parts.
    return text_of(None if isinstance(text, list) else text, f"{name}, a text part,")
