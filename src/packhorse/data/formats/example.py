"""One training example, whatever format it was read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: system, user, assistant or tool.
        content: Text of the turn; may be empty if there are tool calls.
        trained: False for a turn that is only context, whatever its role.
        thinking: Reasoning before the answer, if the row has it as a separate field (`reasoning_content`).
        tool_calls: Calls in OpenAI's form: `{"type": "function", "function": {"name": …, "arguments": {…}}}`, arguments
            as an object, preceded by the call's `id` if the row has it.
        name: Name of the tool that answers, if the row has it.
        call_id: Id of the call that a tool answers (`tool_call_id`), if the row has it.
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
    """One training example: a chat, plain text, or an answer with a verdict.

    Attributes:
        messages: Turns; None for plain text. For a preference pair, the prompt and the chosen answer.
        text: Plain text; None for a chat.
        fields: Other plain values of the row, such as `language`.
        where: Location of the row, `file:line`.
        tools: Definitions of the tools that the assistant may call, in OpenAI's form.
        rejected: Turns of the rejected answer of a preference pair; else None.
        desirable: Verdict of a KTO row; else None.
        used: Keys of the row that its format reads; the others are fields, or refused by `check_unread`.
        unused: Parts of these keys that do not become tokens, such as `answers.answer_start`.
        num_prompt_turns: Number of turns before the chosen answer of a preference pair.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    fields: dict[str, str | int | float | bool]
    where: str
    tools: tuple[dict[str, Any], ...] = field(default=())
    rejected: tuple[Message, ...] | None = None
    desirable: bool | None = None
    used: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    num_prompt_turns: int = 0

    def with_turns(self, change: Callable[[Message], Message]) -> Example:
        """Return the example with each turn changed, also those of a rejected answer."""
        messages, rejected = (turns and tuple(map(change, turns)) for turns in (self.messages, self.rejected))
        return replace(self, messages=messages, rejected=rejected)

    @property
    def rejected_chat(self) -> Example:
        """The prompt of a preference pair with its rejected answer, as a row."""
        prompt = (self.messages or ())[: self.num_prompt_turns]
        turns = (*prompt, *(self.rejected or ()))
        return replace(self, messages=turns, rejected=None, where=f"{self.where} (rejected)")
