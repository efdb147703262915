"""Parts of a row as plain text, for checks of words: copies, languages, evaluations, personal data."""

from __future__ import annotations

import json
from collections.abc import Sequence

from packhorse.data.formats.example import Example, Message


def row_text(example: Example) -> str:
    """Return the text of a row without system turns, one turn per line; for a preference pair with both answers.

    Rows often share a system prompt that is longer than the rest: with it, all would be similar and in its language.
    """
    if example.messages is None:
        return example.text or ""
    turns = example.messages if example.rejected is None else (*example.messages, *example.rejected)
    return "\n".join([_turn_text(turn) for turn in turns if turn.role != "system"])


def prompt_text(example: Example) -> str:
    """Return the turns before the answer without system turns, one turn per line; for plain text, all of it."""
    if example.messages is None:
        return example.text or ""
    prompt = example.messages[: answer_start(example.messages)]
    return "\n".join([_turn_text(turn) for turn in prompt if turn.role != "system"])


def answer_text(example: Example) -> str:
    """Return the last assistant turn of a row and what follows it; for plain text, all of it."""
    if example.messages is None:
        return example.text or ""
    return "\n".join([_turn_text(turn) for turn in example.messages[answer_start(example.messages) :]])


def answer_start(turns: Sequence[Message]) -> int:
    """Return the index of the last assistant turn; the number of turns if there is none."""
    if turns and turns[-1].role == "assistant":
        return len(turns) - 1
    return next((at for at in range(len(turns) - 1, -1, -1) if turns[at].role == "assistant"), len(turns))


def call_text(turn: Message) -> str:
    """Return a turn's calls as JSON without their ids: equal calls with different ids have equal text."""
    return as_json([{key: value for key, value in call.items() if key != "id"} for call in turn.tool_calls])


def as_json(value: object) -> str:
    """Return JSON with sorted keys, so that equal objects have equal text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _turn_text(turn: Message) -> str:
    return f"{turn.content} {call_text(turn)}" if turn.tool_calls else turn.content
