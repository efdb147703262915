"""Chats: `messages` in OpenAI's form and `conversations` in ShareGPT's."""

from __future__ import annotations

from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError
from packhorse.data.formats.content import one_of, other_fields, text_of
from packhorse.data.formats.detect import SYSTEM_KEYS
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.tools import TOOL_KEYS, check_tool_use, tools_of
from packhorse.data.formats.turns import messages_of
from packhorse.data.read.row import Row

MESSAGES_KEYS: Final = frozenset(("messages", *SYSTEM_KEYS, *TOOL_KEYS))
SHAREGPT_KEYS: Final = frozenset(("conversations", *SYSTEM_KEYS, *TOOL_KEYS))


def from_messages(row: Row) -> Example:
    """Return the example of a row with `messages`."""
    return _from_chat(row, "messages", MESSAGES_KEYS)


def from_sharegpt(row: Row) -> Example:
    """Return the example of a row with `conversations`."""
    return _from_chat(row, "conversations", SHAREGPT_KEYS)


def _from_chat(row: Row, key: str, keys: frozenset[str]) -> Example:
    values = row.values
    messages = messages_of(values[key], key)
    # Most rows have only the chat: no tools and no other fields.
    if len(values) == 1:
        check_chat(messages, ())
        return Example(tuple(messages), None, {}, row.where, used=keys)
    return chat_example(row, with_system(values, messages), keys)


def chat_example(row: Row, messages: list[Message], keys: frozenset[str]) -> Example:
    """Return the checked example of a chat, with the row's tools and its other fields.

    Args:
        row: Row.
        messages: Turns of the row.
        keys: Keys of the row that were read.

    Raises:
        BadRowError: The chat has nothing to train on, or uses tools wrongly.
    """
    tools = tools_of(row.values)
    check_chat(messages, tools)
    return Example(tuple(messages), None, other_fields(row.values, keys), row.where, tools, used=keys)


def with_system(values: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Return the turns, with the row's `system` or `system_prompt` as the first turn if it has one.

    Raises:
        BadRowError: The chat begins with another system turn, or the field is not text.
    """
    key = one_of(values, SYSTEM_KEYS)
    if key is None:
        return messages
    system = text_of(values[key], key)
    if not messages or messages[0].role != "system":
        return [Message("system", system), *messages]
    # Some exports write it twice.
    if messages[0].content == system:
        return messages
    raise BadRowError(
        f"the row has {key}, and its chat begins with another system turn.",
        "a chat has one system text.",
        f"remove one of the two, or set the source's ignore: [{key}].",
    )


def check_chat(messages: list[Message], tools: tuple[dict[str, Any], ...]) -> None:
    """Raise BadRowError for a chat that has nothing to train on, or tools that are used wrongly."""
    has_answer = has_trained = uses_tools = False
    for message in messages:
        role = message.role
        if role == "assistant":
            has_answer = True
            uses_tools = uses_tools or bool(message.tool_calls)
            if message.trained:
                has_trained = True
                if not message.tool_calls and is_blank(message.content):
                    raise empty_answer()
        elif role == "tool":
            uses_tools = True
    if not has_trained:
        raise _nothing_trained(has_answer)
    if uses_tools:
        check_tool_use(messages, tools)


def is_blank(text: str) -> bool:
    """Return whether a text is empty or white space, without copying it."""
    return not text or text.isspace()


def empty_answer() -> BadRowError:
    """Return the error of an empty answer."""
    return BadRowError(
        "the answer of an assistant turn is empty.",
        "the model would learn to say nothing.",
        "fill it in, mark the turn train: false, or remove the row.",
    )


def _nothing_trained(has_answer: bool) -> BadRowError:
    if not has_answer:
        return BadRowError(
            "the chat has no assistant turn.",
            "training learns from the assistant's turns.",
            "add the answer, or remove the row.",
        )
    return BadRowError(
        "no assistant turn of the chat is trained on: each has loss weight 0 or train: false.",
        "the row would teach nothing.",
        "mark one turn to be trained on, or remove the row.",
    )
