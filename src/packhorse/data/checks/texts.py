"""The parts of a row as plain text, for what looks at words: copies, languages, evaluations, personal data."""

from __future__ import annotations

import json
from collections.abc import Sequence

from packhorse.data.formats.example import Example, Message


def row_text(example: Example) -> str:
    """Return all that a row says but its system turns, a turn a line; of a preference pair both answers.

    Rows often share a system prompt that is longer than the rest: with it they would all be alike, and in its language.
    """
    if example.messages is None:
        return example.text or ""
    turns = example.messages if example.rejected is None else (*example.messages, *example.rejected)
    return "\n".join([_said(turn) for turn in turns if turn.role != "system"])


def prompt_text(example: Example) -> str:
    """Return what a row asks: its turns before the answer but system turns, a turn a line; of plain text, all."""
    if example.messages is None:
        return example.text or ""
    asked = example.messages[: answer_start(example.messages)]
    return "\n".join([_said(turn) for turn in asked if turn.role != "system"])


def answer_text(example: Example) -> str:
    """Return a row's answer: its last assistant turn and what follows it; of plain text, all."""
    if example.messages is None:
        return example.text or ""
    return "\n".join([_said(turn) for turn in example.messages[answer_start(example.messages) :]])


def answer_start(turns: Sequence[Message]) -> int:
    """Return where the last assistant turn stands; after the last turn where there is none."""
    if turns and turns[-1].role == "assistant":
        return len(turns) - 1
    return next((at for at in range(len(turns) - 1, -1, -1) if turns[at].role == "assistant"), len(turns))


def call_text(turn: Message) -> str:
    """Return a turn's calls as JSON without their ids: the same call under another number says the same."""
    return as_json([{key: value for key, value in call.items() if key != "id"} for call in turn.tool_calls])


def as_json(value: object) -> str:
    """Return JSON in which equal objects are equal text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _said(turn: Message) -> str:
    return f"{turn.content} {call_text(turn)}" if turn.tool_calls else turn.content
