"""Convert a row's messages to what a template takes, and select the turns that are trained on."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.formats.example import Example, Message
from packhorse.data.render.control_tokens import ControlTokens
from packhorse.recipe.schema import TrainOnSection

THINKING: Final = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
OPEN_THINKING: Final = "<think>"
CLOSE_THINKING: Final = "</think>"

Turn = dict[str, Any]


def template_turns(example: Example, train_on: TrainOnSection, control: ControlTokens) -> list[Turn]:
    """Return the messages as `apply_chat_template` takes them.

    Raises:
        BadRowError: The row has a typed control token, or thinking that is to be removed and does not end.
    """
    without_thinking = train_on.thinking == "remove"
    turns: list[Turn] = []
    for number, message in enumerate(example.messages or (), 1):
        content = control.checked(message.content, f"turn {number} ({message.role})")
        if without_thinking and message.role == "assistant":
            content = _without_thinking(content, message, number)
        turn = {"role": message.role, "content": content}
        if message.thinking is not None or message.tool_calls or message.name is not None or message.call_id:
            _add_rare_fields(turn, message, number, control, without_thinking)
        turns.append(turn)
    return turns


def template_tools(example: Example, control: ControlTokens) -> list[dict[str, Any]] | None:
    """Return the tool definitions as `apply_chat_template` takes them; None if the row has none.

    Raises:
        BadRowError: The definitions have a typed control token.
    """
    return [_checked(tool, "a tool definition", control) for tool in example.tools] if example.tools else None


def trained_turns(example: Example, train_on: TrainOnSection) -> list[int]:
    """Return the indices of the turns that are trained on.

    Raises:
        BadRowError: There are none.
    """
    messages = example.messages or ()
    roles = train_on.roles
    places = [place for place, message in enumerate(messages) if message.role in roles]
    if train_on.turns == "last":
        places = places[-1:]
    trained = [place for place in places if messages[place].trained]
    if trained:
        return trained
    selected = "the last turn" if train_on.turns == "last" else "the turns"
    raise BadRowError(
        f"the row has no supervised token: {selected} with the role {' or '.join(roles)}: {len(places)}, of which 0 "
        f"are trained on: {_shown(messages)}",
        "it would teach nothing.",
        "mark a turn to be trained on, change data.train_on, or remove the row.",
    )


def _shown(messages: tuple[Message, ...]) -> str:
    return excerpt("\n".join(f"{message.role}: {message.content}" for message in messages))


def _without_thinking(content: str, message: Message, number: int) -> str:
    if OPEN_THINKING not in content and CLOSE_THINKING not in content:
        return content
    left = THINKING.sub("", content)
    if OPEN_THINKING in left or CLOSE_THINKING in left:
        raise BadRowError(
            f"the thinking of turn {number} begins without an end, or ends without a beginning: {excerpt(content)}",
            "data.train_on.thinking is remove, and the start of the answer is unknown.",
            "write <think>…</think> around it, or set data.train_on.thinking to keep.",
        )
    if not left.strip() and not message.tool_calls:
        raise BadRowError(
            f"nothing is left of turn {number} without its thinking: {excerpt(content)}",
            "the model would learn to answer nothing.",
            "add the answer, remove the row, or set data.train_on.thinking to keep.",
        )
    return left


def _add_rare_fields(turn: Turn, message: Message, number: int, control: ControlTokens, without_thinking: bool) -> None:
    if message.thinking is not None and not without_thinking:
        thinking = control.checked(message.thinking, f"the thinking of turn {number}")
        # apply_chat_template passes both names to the template.
        turn["thinking"] = turn["reasoning_content"] = thinking
    if message.tool_calls:
        turn["tool_calls"] = [_checked(call, f"a tool call of turn {number}", control) for call in message.tool_calls]
    if message.name is not None:
        turn["name"] = control.checked(message.name, f"the name of turn {number}")
    if message.call_id:
        turn["tool_call_id"] = control.checked(message.call_id, f"the call id of turn {number}")


def _checked(value: Any, what: str, control: ControlTokens) -> Any:  # noqa: ANN401  # JSON
    """Check every text in a JSON value, and return the value."""
    if isinstance(value, str):
        return control.checked(value, what)
    if isinstance(value, dict):
        return {_checked(key, what, control): _checked(item, what, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item, what, control) for item in value]
    return value


def json_text(text: str) -> tuple[str, str]:
    """Return a text as it appears inside a JSON string, in UTF-8 and in ASCII."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
