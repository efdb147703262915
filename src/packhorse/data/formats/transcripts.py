r"""Chats written as one text, as in Anthropic's hh-rlhf: `\n\nHuman: …\n\nAssistant: …`."""

from __future__ import annotations

import re
from typing import Final

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.formats.example import Message

BEGINNING: Final = re.compile(r"\s*Human:")
SPEAKER: Final = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES: Final = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: object) -> bool:
    """Return whether a value is a text that begins with `Human:` and has a turn of the assistant."""
    return isinstance(value, str) and BEGINNING.match(value) is not None and "\n\nAssistant:" in value


def transcript_turns(text: str) -> list[Message]:
    """Return the turns of a transcript; without the last one where it is empty, as in a prompt.

    Raises:
        BadRowError: Another turn is empty.
    """
    _, *parts = SPEAKER.split(text.strip())
    turns = [Message(ROLES[speaker], said.strip()) for speaker, said in zip(parts[::2], parts[1::2])]
    if not turns[-1].content:
        turns.pop()
    empty = next((number for number, turn in enumerate(turns, 1) if not turn.content), None)
    if empty is not None:
        raise BadRowError(
            f"turn {empty} of the transcript is empty: {excerpt(text)}",
            "nobody answers nothing.",
            "fill it in, or remove the row.",
        )
    return turns
