"""One row to learn from, whatever form it was read in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: system, user, assistant or tool.
        content: What is said; may be empty beside tool calls.
        trained: False for a turn that is only context, whatever its role.
        thinking: What the assistant thinks before it speaks, where the row keeps it apart (`reasoning_content`).
        tool_calls: Calls in OpenAI's form: `{"type": "function", "function": {"name": …, "arguments": {…}}}`, arguments
            as an object, and the call's `id` before them where the row has it.
        name: Of the tool that answers, where the row has it.
        call_id: Of the call that a tool answers (`tool_call_id`), where the row has it.
    """

    role: str
    content: str
    trained: bool = True
    thinking: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row to learn from: a chat, plain text, or an answer with a verdict.

    Attributes:
        messages: The turns; None for plain text. Of a preference pair, the prompt and the chosen answer.
        text: Plain text; None for a chat.
        fields: The row's other plain values, such as `language`.
        where: `file:line`.
        tools: Definitions of the tools that the assistant may call, in OpenAI's form.
        rejected: Of a preference pair, the turns of the rejected answer; else None.
        desirable: Of a KTO row, the verdict; else None.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    fields: dict[str, str | int | float | bool]
    where: str
    tools: tuple[dict[str, Any], ...] = field(default=())
    rejected: tuple[Message, ...] | None = None
    desirable: bool | None = None
