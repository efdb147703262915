"""Refuse a row whose other keys carry a part of the conversation that its format does not read."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, ignore_line, names
from packhorse.data.formats.detect import KEYS_OF, keys_of_formats, matching_formats
from packhorse.data.formats.example import Example
from packhorse.data.formats.turns import MEDIA_KEYS, ROLES
from packhorse.recipe.objectives import RowFormat

LONG_TEXT_CHARACTERS: Final = 200
# Names of what a model should see or write, also in the plural -> the key of a format that takes it.
SAME_AS: Final[Mapping[str, str]] = {
    "context": "context", "passage": "context", "document": "context", "paragraph": "context", "evidence": "context",
    "system": "system", "system_prompt": "system", "system_message": "system", "system_instruction": "system",
    "input": "input", "history": "history", "chat_history": "history", "conversation_history": "history",
}  # fmt: skip
CARRIERS: Final = frozenset((
    "prompt", "instruction", "question", "query", "completion", "response", "output", "answer", "reply", "chosen",
    "rejected", "text", "summary", "conversation", "dialog", "dialogue", "tool_call", "function_call", "reasoning",
    "reasoning_content", "thinking", "thought", "rationale", "chain_of_thought", "choices", "options",
))  # fmt: skip
# Names that may also be a count or a short label: only lists and objects carry a conversation.
LISTS: Final[Mapping[str, str]] = {
    "tools": "tools", "functions": "tools", "available_tools": "tools", "tool_definitions": "tools",
    "messages": "", "turns": "", "replies": "",
}  # fmt: skip
ACCEPTED_ANSWERS: Final = "answers"  # further accepted answers are metadata
METADATA: Final = re.compile(r"meta.*|.*metadata|.*_meta|.*info|provenance|annotations?|licen[cs]e|copyright|citation")
SPEAKER_KEYS: Final = frozenset(("role", "from", "speaker"))
SPEECH_KEYS: Final = frozenset(("content", "value", "text", "message"))
WHY_MEDIA: Final = "Packhorse trains on text: images, audio and video do not become tokens."
WHY_NAME: Final = "by its name it belongs to the conversation; without it, the row would teach something else."
WHY_TEXT: Final = "it may belong to the conversation; without it, the row would teach something else."


def check_unread(values: Mapping[str, Any], example: Example, row_format: RowFormat, declared: bool) -> None:
    """Raise BadRowError if keys that were not read carry a part of the conversation.

    Numbers, short texts and nested metadata are allowed, and so is a copy of what was read.

    Args:
        values: Row under the names of its format.
        example: Example that was made of it.
        row_format: Format of the row.
        declared: Whether the source declares the format; the keys of other formats are then intended to be metadata.

    Raises:
        BadRowError: Such keys, with the line for the recipe.
    """
    unread = {key: value for key, value in values.items() if key not in example.used and not _is_plain(key, value)}
    if not unread:
        return
    if declared:
        others = keys_of_formats(KEYS_OF)
        unread = {key: value for key, value in unread.items() if key not in others}
    said = list(_texts({key: value for key, value in values.items() if key in example.used}))
    if rivals := [] if declared else [name for name in matching_formats(values) if name != row_format]:
        _refuse_rivals(unread, said, row_format, rivals)
    refuse_carriers(unread, said, row_format, {key for key in example.used if not values.get(key)})


def refuse_carriers(
    unread: Mapping[str, Any], said: Sequence[str], owner: str, free: Container[str | None] = ()
) -> None:
    """Raise BadRowError for keys that carry a part of the conversation.

    Args:
        unread: Keys that were not read, and their values.
        said: Texts that were read.
        owner: Format, or part of the row, that does not read them.
        free: Keys that the format reads and the row lacks.
    """
    reasons = {key: why for key, value in unread.items() if (why := _reason(key, value, said))}
    if not reasons:
        return
    ignore = f"{ignore_line(reasons)} in the source to train without it"
    mapped = {ours: key for key in reasons if (ours := SAME_AS.get(_name(key)) or LISTS.get(_name(key))) in free}
    columns = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapped.items())
    raise BadRowError(
        f"the row has {names(reasons)}, which {owner} does not read.",
        next(why for why in (WHY_MEDIA, WHY_NAME, WHY_TEXT) if why in reasons.values()),
        f"write columns: {{{columns}}} in the source to use it, or {ignore}." if columns else f"write {ignore}.",
    )


def _refuse_rivals(
    unread: Mapping[str, Any], said: Sequence[str], row_format: RowFormat, rivals: Sequence[RowFormat]
) -> None:
    keys = keys_of_formats(rivals)
    lost = [key for key, value in unread.items() if key in keys and _reason(key, value, said)]
    if lost:
        raise BadRowError(
            f"the row has the keys of {row_format} and of {' and of '.join(rivals)}.",
            "two formats match, and each would train on another part of the row.",
            f"set the source's format: {row_format} or format: {' or '.join(rivals)}, or its {ignore_line(lost)}.",
        )


def _reason(key: str, value: object, said: Sequence[str]) -> str:
    """Return why a value may be a part of the conversation; empty if it is metadata, or a copy of what was read."""
    if value is None or isinstance(value, (bool, int, float)) or value in ("", [], {}):
        return ""
    kind = _kind(key)
    if kind == "media" or _has_bytes(value):
        return WHY_MEDIA
    if kind == "metadata":
        return ""
    if isinstance(value, str):
        value = _parsed(value)
    is_text = isinstance(value, str)
    if kind == "carrier" or (kind == "list" and not is_text) or (kind == "role" and is_text and value in ROLES):
        return "" if _is_copy(value, said) else WHY_NAME
    if _has_turns(value, said):
        return "" if _is_copy(value, said) else WHY_TEXT
    size = sum(len(text) for text in _texts(value) if len(text.split(maxsplit=1)) > 1 and not _is_within(text, said))
    return WHY_TEXT if size > LONG_TEXT_CHARACTERS else ""


def _has_turns(value: object, said: Sequence[str]) -> bool:
    """Return whether a nested value holds a turn of a chat, or a key whose name carries a conversation."""
    if isinstance(value, list):
        return any(_has_turns(one, said) for one in value)
    if not isinstance(value, dict):
        return False
    if not SPEAKER_KEYS.isdisjoint(value) and not SPEECH_KEYS.isdisjoint(value):
        return True
    return any(_reason(str(key), inner, said) for key, inner in value.items())


def _is_copy(value: object, said: Sequence[str]) -> bool:
    """Return whether all texts of a value were read, or a text holds all texts that were read, in their order."""
    texts = list(_texts(value))
    if not texts:
        return False
    if all(text.strip() in {one.strip() for one in said} for text in texts):
        return True
    return isinstance(value, str) and _is_rendering(value, said)


def _is_rendering(text: str, said: Sequence[str]) -> bool:
    """Return whether a text holds all texts that were read, in their order, such as a prompt that is already filled."""
    at = 0
    for one in filter(None, map(str.strip, said)):
        # Bounded by what is no letter: "p" is not a part of "paper".
        found = re.compile(rf"(?<!\w){re.escape(one)}(?!\w)").search(text, at)
        if found is None:
            return False
        at = found.end()
    return at > 0


def _is_within(text: str, said: Sequence[str]) -> bool:
    return any(text.strip() in one for one in said)


def _texts(value: object, key: str = "") -> Iterator[str]:
    """Yield the texts of a value at any depth, except roles and types."""
    if isinstance(value, str):
        if key not in ("role", "from", "type"):
            yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def _has_bytes(value: object) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (bytes, bytearray, memoryview))


def _parsed(text: str) -> object:
    """Return the object or list that a text of JSON holds; the text itself if it is not JSON."""
    if text[:1] not in ("{", "["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_plain(key: str, value: object) -> bool:
    """Return whether a value is a number, or a short text whose key says nothing: the case of most keys."""
    if isinstance(value, str):
        return 0 < len(value) <= LONG_TEXT_CHARACTERS and value[0] not in "{[" and not _kind(key)
    return value is None or isinstance(value, (bool, int, float))


@lru_cache(maxsize=4096)
def _kind(key: str) -> str:
    """Return what the name of a key says: `media`, `metadata`, `carrier`, `list`, `role`, or nothing."""
    name = _name(key)
    if name in MEDIA_KEYS:
        return "media"
    if METADATA.fullmatch(name):
        return "metadata"
    if name in SAME_AS or name in CARRIERS:
        return "carrier"
    return "list" if name in LISTS else "role" if name == "role" else ""


def _name(key: object) -> str:
    """Return a key in small letters with underscores, and in the singular if that is a name of a conversation."""
    name = str(key).lower().replace("-", "_")
    singular = f"{name[:-3]}y" if name.endswith("ies") else name.removesuffix("s")
    return singular if name != ACCEPTED_ANSWERS and (singular in SAME_AS or singular in CARRIERS) else name
