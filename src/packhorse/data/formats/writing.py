"""Write an `Example` as a row: OpenAI's messages, or Alpaca; what the form cannot hold is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packhorse.data.formats.bad_row import BadRowError, names, shown
from packhorse.data.formats.chats import MESSAGES_KEYS
from packhorse.data.formats.detect import detect_format
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.single_turn import ALPACA_KEYS
from packhorse.data.formats.tools import NOTHING
from packhorse.recipe.objectives import RowFormat


def chat_of(example: Example) -> tuple[Message, ...]:
    """Return the turns of a row that is one chat.

    Raises:
        BadRowError: The row is plain text, or has a verdict, which no chat form can hold.
    """
    if example.messages is None:
        raise BadRowError(
            "the row is plain text.", "a chat form has turns.", "remove the row; plain text is trained on unchanged."
        )
    if example.rejected is not None or example.desirable is not None:
        what = "a rejected answer" if example.rejected is not None else "a verdict on its answer"
        raise BadRowError(
            f"the row has {what}.",
            "a chat form has no field for it, and without it a bad answer would be trained on like a good one.",
            "remove the row, or write the good answers alone as chats: --to chosen.",
        )
    return example.messages


def to_messages(example: Example, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row as `messages`, with tools and its other fields.

    Args:
        example: Row as Packhorse reads it.
        others: Fields of the row besides the chat, of any type.

    Raises:
        BadRowError: The row is not a chat, or a field would be read as part of one.
    """
    row: dict[str, Any] = {"messages": [turn_of(message) for message in chat_of(example)]}
    if example.tools:
        row["tools"] = list(example.tools)
    return with_others(row, others, "messages", MESSAGES_KEYS)


def to_alpaca(example: Example, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row as `instruction`, `input`, `output`, `system` and `history`, with its other fields.

    Raises:
        BadRowError: The row is not a chat in the order [system] user assistant …, or has what Alpaca cannot hold.
    """
    turns = list(chat_of(example))
    system = turns.pop(0).content if turns[0].role == "system" else None
    _check_alpaca(example, turns, system)
    pairs = [[question.content, answer.content] for question, answer in zip(turns[::2], turns[1::2])]
    row: dict[str, Any] = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    if system is not None:
        row["system"] = system
    if len(pairs) > 1:
        row["history"] = pairs[:-1]
    return with_others(row, others, "alpaca", ALPACA_KEYS)


def turn_of(message: Message) -> dict[str, Any]:
    """Return a turn with its optional parts."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    optional = {
        "reasoning_content": message.thinking,
        "tool_calls": list(message.tool_calls) or None,
        "name": message.name,
        "tool_call_id": message.call_id,
        "train": None if message.trained else False,
    }
    return turn | {key: value for key, value in optional.items() if value is not None}


def _check_alpaca(example: Example, turns: list[Message], system: str | None) -> None:
    wanted = ["user", "assistant"] * (len(turns) // 2)
    roles = [message.role for message in turns]
    why = "an Alpaca row is an instruction and an output, after a system text and earlier pairs."
    if not turns or roles != wanted:
        order = " ".join(message.role for message in example.messages or ())
        raise BadRowError(
            f"the turns are {shown(order)}, not [system] user assistant …",
            why,
            "remove the row, or write the file with --to messages.",
        )
    # An empty system text would be read back as no system turn.
    if system == "":
        raise BadRowError("the system turn is empty.", why, "remove the turn.")
    extra = [
        ("tools", bool(example.tools)),
        ("tool calls", any(turn.tool_calls for turn in turns)),
        ("reasoning_content", any(turn.thinking is not None for turn in turns)),
        ("names of speakers", any(turn.name is not None for turn in turns)),
        ("an answer with train: false", any(turn.role == "assistant" and not turn.trained for turn in turns)),
    ]
    present = [name for name, there in extra if there]
    if present:
        raise BadRowError(
            f"the row has {' and '.join(present)}, which Alpaca cannot hold.",
            "without it, the row would silently teach something else.",
            "remove the row, or write the file with --to messages.",
        )


def with_others(
    row: dict[str, Any], others: Mapping[str, Any], form: RowFormat, keys: frozenset[str]
) -> dict[str, Any]:
    """Return the row with its other fields; raise BadRowError if the form would read one as part of the chat."""
    # A field named `input` would become part of an Alpaca prompt, and `label` may make a chat a KTO row.
    clash = [key for key in others if key in keys and others[key] not in NOTHING]
    whole = row | {key: value for key, value in others.items() if key not in keys}
    if not clash and detect_format(whole) != form:
        clash = [key for key in others if detect_format({**row, key: others[key]}) != form] or list(others)
    if clash:
        raise BadRowError(
            f"the row's other fields {names(clash)} would be read as part of the chat in the {form} form.",
            "what is written must be read back unchanged.",
            "rename these fields, or remove them.",
        )
    return whole
