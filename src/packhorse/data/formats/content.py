"""Get the text of a row that becomes tokens, and the plain fields next to it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names, shown
from packhorse.data.formats.tools import calls_of

PLAIN: Final = (str, int, float)  # a bool is an int
Fields = dict[str, str | int | float | bool]
THINKING_PARTS: Final = ("reasoning", "thinking")
CALL_PART: Final = "tool_call"
TEXT_KEYS_OF_PART: Final = ("text", "value")


@dataclass(frozen=True, slots=True)
class Content:
    """Content of a turn: its text, its thinking if a part holds it, and the calls in its parts."""

    text: str
    thinking: str | None = None
    calls: tuple[dict[str, Any], ...] = ()


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
    if isinstance(value, list) and value:
        content = content_of(value, name)
        if content.thinking is None and not content.calls:
            return content.text
        raise BadRowError(
            f"{name} has a part of type {THINKING_PARTS[0] if content.thinking is not None else CALL_PART}.",
            "only an assistant turn of a list of turns has such parts.",
            "keep only text parts, or write the row as messages.",
        )
    what = "null" if value is None else "an empty list" if value == [] else type(value).__name__
    raise BadRowError(f"{name} is {what}, not text.", "only text becomes tokens.", "write it as text in double quotes.")


def optional_text(values: Mapping[str, Any], key: str, name: str = "") -> str | None:
    """Return the text of a key; None if the key is absent, null or an empty text.

    Raises:
        BadRowError: The value has another type: 0, false and [] are values too.
    """
    value = values.get(key)
    return None if value is None or value == "" else text_of(value, name or key)


def content_of(value: object, name: str) -> Content:
    """Return the content of a turn, from a text or from parts of the types text, reasoning and tool_call.

    Raises:
        BadRowError: The value or a part of it has another type.
    """
    if not isinstance(value, list) or not value:
        return Content(text_of(value, name))
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, dict) and kind == "text":
            texts.append(_part_text(part, TEXT_KEYS_OF_PART, f"{name}, a text part,"))
        elif isinstance(part, dict) and kind in THINKING_PARTS:
            thoughts.append(_part_text(part, (*TEXT_KEYS_OF_PART, str(kind)), f"{name}, a {kind} part,"))
        elif isinstance(part, dict) and kind == CALL_PART:
            calls += _part_calls(part, name)
        else:
            raise _no_text_part(kind, name)
    return Content("".join(texts), "".join(thoughts) if thoughts else None, tuple(calls))


def one_of(values: Mapping[str, Any], keys: Sequence[str], owner: str = "the row") -> str | None:
    """Return the key that has a value, of several keys for one thing; None if none has: null and "" are no value.

    Raises:
        BadRowError: Two of them have different values.
    """
    given = [key for key in keys if values.get(key) is not None and values[key] != ""]
    for key in given[1:]:
        if values[key] != values[given[0]] or type(values[key]) is not type(values[given[0]]):
            raise BadRowError(
                f"{owner} has {given[0]} and {key}, with different values.",
                "they are two names of one thing, and only one value can be used.",
                f"set the source's ignore: [{key}] or ignore: [{given[0]}].",
            )
    return given[0] if given else None


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
    """Return the row's plain values whose names are not among the keys that its format reads.

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


def _part_text(part: dict[str, Any], keys: tuple[str, ...], name: str) -> str:
    _refuse_unknown(part, ("type", *keys), name)
    key = one_of(part, keys, name)
    value = part[key] if key else next((part[key] for key in keys if part.get(key) is not None), None)
    # A list is refused here: parts have no parts.
    return text_of(None if isinstance(value, list) else value, name)


def _part_calls(part: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    inner = one_of(part, ("value", CALL_PART), name)
    if inner is None:
        return calls_of({key: value for key, value in part.items() if key != "type"}, f"a call in {name}")
    _refuse_unknown(part, ("type", "value", CALL_PART), name)
    return calls_of(part[inner], f"a call in {name}")


def _refuse_unknown(part: dict[str, Any], keys: tuple[str, ...], name: str) -> None:
    unknown = [key for key, value in part.items() if key not in keys and value is not None]
    if unknown:
        raise BadRowError(
            f"{name} has {names(unknown)}; the keys of such a part are {', '.join(keys)}.",
            "a key that nothing reads would be lost.",
            f"remove {names(unknown)} from the part.",
        )


def _no_text_part(kind: object, name: str) -> BadRowError:
    word = kind if isinstance(kind, str) and kind.isidentifier() else shown(kind)
    return BadRowError(
        f"{name} has a part of type {word}.",
        "Packhorse trains on text: images, audio and video do not become tokens.",
        "keep only parts of the types text, reasoning and tool_call, or remove the row.",
    )
