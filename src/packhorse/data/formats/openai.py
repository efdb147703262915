"""Write rows for OpenAI's hosted fine-tuning, by the published rules for supervised chat files.

Rules: guide «Supervised fine-tuning» and API reference «fine-tuning, chat input» of developers.openai.com, and the
notebook «Data preparation and analysis for chat model fine-tuning» of the OpenAI cookbook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.writing import chat_of

LEAST_EXAMPLES: Final = 10
LARGEST_FILE_BYTES: Final = 512 * 1024**2
MOST_TOOLS: Final = 128
TOOL_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ROW_FIELDS: Final = ("parallel_tool_calls",)


def to_openai(example: Example, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row in the service's form: only `messages`, `tools` and `parallel_tool_calls`.

    Arguments of calls become JSON text. Calls without an id get one, and so do the answers to them.

    Args:
        example: Row as Packhorse reads it.
        others: Fields of the row besides the chat; the service refuses files with unknown fields, so they are dropped.

    Raises:
        BadRowError: The row breaks a rule of the service.
    """
    messages = chat_of(example)
    if messages[-1].role != "assistant":
        raise BadRowError(
            f"the chat ends with a turn of the role {messages[-1].role}.",
            "the service trains on the assistant's last turn.",
            "end it with the assistant's answer, or remove the row.",
        )
    _check_names(example)
    row: dict[str, Any] = {"messages": _turns(messages)}
    if example.tools:
        row["tools"] = list(example.tools)
    return row | {key: others[key] for key in ROW_FIELDS if isinstance(others.get(key), bool)}


def _check_names(example: Example) -> None:
    called = [call["function"]["name"] for message in example.messages or () for call in message.tool_calls]
    bad = [name for name in (*_defined(example), *called) if not TOOL_NAME.fullmatch(name)]
    if bad:
        raise BadRowError(
            f"the row has the tool {names(bad[:1])}.",
            "the service accepts names of 1 to 64 letters, digits, underscores and dashes.",
            "rename the tool.",
        )
    if len(example.tools) > MOST_TOOLS:
        raise BadRowError(
            f"the row has {len(example.tools)} tools.",
            f"the service accepts {MOST_TOOLS}.",
            "remove tools, or remove the row.",
        )


def _defined(example: Example) -> list[str]:
    return [tool["function"]["name"] for tool in example.tools]


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    turns = []
    open_calls: list[dict[str, Any]] = []
    num_calls = 0
    for number, message in enumerate(messages, 1):
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if message.role == "tool":
            turn["tool_call_id"] = _answered(message, open_calls, number)["id"]
        else:
            open_calls = [_call(call, num_calls + at) for at, call in enumerate(message.tool_calls, 1)]
            num_calls += len(open_calls)
        if open_calls and message.role == "assistant":
            turn |= {"content": message.content or None, "tool_calls": list(open_calls)}
        if message.role == "assistant":
            _check_thinking(message, number)
            turn |= {} if message.trained else {"weight": 0}
        turns.append(turn)
    return turns


def _call(call: dict[str, Any], number: int) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": call.get("id", f"packhorse_call_{number}"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _answered(message: Message, open_calls: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Return the call that a tool answers, found by id, name or order, and remove it from the open calls."""
    fits = [
        call
        for call in open_calls
        if (message.call_id is None or call["id"] == message.call_id)
        and (message.call_id is not None or message.name is None or call["function"]["name"] == message.name)
    ]
    if not fits:
        raise BadRowError(
            f"turn {number} is a tool's answer, and no earlier call is unanswered.",
            "the service matches each answer to one call by its id.",
            "write the call's id as tool_call_id, or remove the turn.",
        )
    open_calls.remove(fits[0])
    return fits[0]


def _check_thinking(message: Message, number: int) -> None:
    if message.thinking is not None:
        raise BadRowError(
            f"turn {number} has reasoning_content.",
            "the service's form has no field for it.",
            "remove it from the row, or move it into content if it should be trained on.",
        )
