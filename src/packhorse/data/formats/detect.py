"""Detect the format of a row from its keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from packhorse.data.formats.bad_row import SHOWN_NAMES, closest, names
from packhorse.recipe.objectives import RowFormat

KEYS_OF: Final[Mapping[RowFormat, tuple[str, ...]]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text_label": ("text", "label"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "ranked": ("prompt", "completions", "scores"),
    "rated": ("prompt", "completion", "rating"),
    "tree": ("text", "role", "replies"),
}
RANK_KEYS: Final = ("ranks", "rank")
SCORE_KEYS: Final = ("scores", "ratings", *RANK_KEYS)
RATING_KEYS: Final = ("rating", "score")
# Other names of a required key.
NAMES_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "completions": ("completions", "responses"),
    "scores": SCORE_KEYS,
    "rating": RATING_KEYS,
    "output": ("output", "response"),
    "completion": ("completion", "response"),
    "answer": ("answer", "answers", "response"),
}
SYSTEM_KEYS: Final = ("system", "system_prompt")
CONTEXT_KEYS: Final = ("input", "context")
OPTIONAL_KEYS: Final = (*SYSTEM_KEYS, *CONTEXT_KEYS, "tools", "functions", "history", "kto_tag", "response", "answers")
LABEL_KEYS: Final = ("label", "category", "class", "intent")
VERDICT_KEYS: Final = ("label", "kto_tag")
KNOWN_KEYS: Final = frozenset((*OPTIONAL_KEYS, *LABEL_KEYS, *(key for keys in KEYS_OF.values() for key in keys)))
SIMPLE_FORMATS: Final[tuple[RowFormat, ...]] = (
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
)
# A row with one of these keys besides the keys of its format may have another format.
RIVALS_OF: Final[Mapping[RowFormat, frozenset[str]]] = {
    "messages": frozenset(("chosen", "rejected", *VERDICT_KEYS)),
    "sharegpt": frozenset(("chosen", "rejected", *VERDICT_KEYS)),
    "alpaca": frozenset(("chosen", "rejected")),
    "prompt_completion": frozenset(("chosen", "rejected", *VERDICT_KEYS)),
    "text": frozenset(LABEL_KEYS),
}


def detect_format(values: Mapping[str, Any]) -> RowFormat | None:
    """Return the format of a row by its keys; None if no format matches."""
    # Formats with a verdict come first: read as a plain chat, a bad answer would be trained on.
    if "chosen" in values and "rejected" in values:
        return "preference"
    if _has_verdict(values) or _is_ranked(values):
        return "kto" if _has_verdict(values) else "ranked"
    if is_tree(values):
        return "tree"
    # A chat with a summary in `text` stays a chat.
    if (simple := next((name for name in SIMPLE_FORMATS if _has_keys(values, name)), None)) is not None:
        return simple
    if "text" not in values:
        return None
    return "text_label" if any(key in values for key in LABEL_KEYS) else "text"


def matching_formats(values: Mapping[str, Any]) -> list[RowFormat]:
    """Return the formats of one prompt and one answer, of chats and of text for which a row has all keys."""
    text: list[RowFormat] = ["text"] if "text" in values else []
    return [*(name for name in SIMPLE_FORMATS if _has_keys(values, name)), *text]


def keys_of_formats(row_formats: Iterable[RowFormat]) -> set[str]:
    """Return the required keys of formats, under all their names."""
    return {name for row_format in row_formats for key in KEYS_OF[row_format] for name in NAMES_OF.get(key, (key,))}


def is_tree(values: Mapping[str, Any]) -> bool:
    """Return whether a row is a message with its replies, alone or in `prompt` (OpenAssistant)."""
    node = values["prompt"] if isinstance(values.get("prompt"), dict) else values
    return isinstance(node.get("replies"), list) and "text" in node


def missing_keys(values: Mapping[str, Any], row_format: RowFormat) -> list[str]:
    """Return the keys that a row lacks for a format."""
    if row_format == "text_label":
        present = "text" in values, any(key in values for key in LABEL_KEYS)
        return [name for name, there in zip(("text", f"{' or '.join(LABEL_KEYS)}"), present) if not there]
    if row_format == "kto":
        chat = any(key in values for key in ("messages", "conversations")) or _has_keys(values, "prompt_completion")
        verdict = any(key in values for key in VERDICT_KEYS)
        return [*([] if chat else ["messages or prompt and completion"]), *([] if verdict else ["label"])]
    if row_format == "tree" and is_tree(values):
        return []
    return [key for key in KEYS_OF[row_format] if not _has_key(values, key)]


def known_formats() -> str:
    """Return all formats with their keys, for a message."""
    return "; ".join(f"{name} ({', '.join(keys)})" for name, keys in KEYS_OF.items())


def resembles(values: Mapping[str, Any]) -> str:
    """Return which of a row's keys are close to known ones, in brackets; empty if none is."""
    first = [key for key, _ in zip(values, range(SHOWN_NAMES))]
    pairs = [(key, closest(str(key), KNOWN_KEYS, cutoff=0.75)) for key in first if key not in KNOWN_KEYS]
    near = [f"{names([key])} is close to {close}" for key, close in pairs if close]
    return f" ({'; '.join(near)})" if near else ""


def _has_keys(values: Mapping[str, Any], row_format: RowFormat) -> bool:
    return all(_has_key(values, key) for key in KEYS_OF[row_format])


def _has_key(values: Mapping[str, Any], key: str) -> bool:
    return key in values or any(name in values for name in NAMES_OF.get(key, ()))


def _has_verdict(values: Mapping[str, Any]) -> bool:
    if not any(isinstance(values.get(key), bool) for key in VERDICT_KEYS):
        return False
    return "messages" in values or "conversations" in values or _has_keys(values, "prompt_completion")


def _is_ranked(values: Mapping[str, Any]) -> bool:
    lists = (NAMES_OF["completions"], SCORE_KEYS)
    return _has_key(values, "prompt") and all(any(isinstance(values.get(key), list) for key in keys) for keys in lists)
