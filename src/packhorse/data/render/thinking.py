"""Refuse or repair half a thinking block: `</think>` without `<think>`, or `<think>` without `</think>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.formats.example import Example, Message
from packhorse.data.render.chat_template import ChatTemplate
from packhorse.data.render.spans import TurnSpan
from packhorse.data.render.turns import CLOSE_THINKING, OPEN_THINKING

MARK: Final = re.compile(f"{OPEN_THINKING}|{CLOSE_THINKING}")
QUESTION: Final = ({"role": "user", "content": "question of the probe"},)


@dataclass(frozen=True)
class ThinkingMarks:
    """What a template does with `<think>` and `</think>`.

    Attributes:
        known: Whether the template writes or reads the marks, or the tokenizer has them.
        prompt_opens: Whether the generation prompt ends inside `<think>`, so that an answer begins inside it too.
    """

    known: bool
    prompt_opens: bool

    def check_turns(self, messages: Sequence[Message]) -> None:
        """Refuse an assistant turn with half a thinking block.

        Raises:
            BadRowError: The first such turn.
        """
        if not self.known:
            return
        for number, message in enumerate(messages, 1):
            if message.role == "assistant":
                self._check_turn(message, number)

    def _check_turn(self, message: Message, number: int) -> None:
        if message.thinking is not None and (mark := MARK.search(message.thinking)):
            raise BadRowError(
                f"the thinking of turn {number} has {mark[0]} in its text: {excerpt(message.thinking, mark.start())}",
                "the template writes both marks around it, and the model would learn to write one of them twice.",
                f"remove {mark[0]} from reasoning_content.",
            )
        content = message.content
        if OPEN_THINKING not in content and CLOSE_THINKING not in content:
            return
        is_open = self.prompt_opens and message.thinking is None and _first_mark(content) == CLOSE_THINKING
        for mark in MARK.finditer(content):
            if (mark[0] == OPEN_THINKING) == is_open:
                raise _half(message, number, content, mark)
            is_open = not is_open
        if is_open:
            *_, last = MARK.finditer(content)
            raise _half(message, number, content, last)

    def check_spans(self, text: str, spans: Sequence[TurnSpan], messages: Sequence[Message]) -> None:
        """Refuse a trained answer that never leaves the thinking that its generation prompt opens.

        Raises:
            BadRowError: The first such answer.
        """
        if not self.prompt_opens:
            return
        for span in spans:
            if messages[span.place].role == "assistant" and text.find(CLOSE_THINKING, span.start, span.end) < 0:
                raise BadRowError(
                    f"turn {span.place + 1} (assistant) has no {CLOSE_THINKING}, and the generation prompt ends inside "
                    f"{OPEN_THINKING}: {excerpt(text, span.start)}",
                    "the model would learn that its answer is thinking that never ends.",
                    "add reasoning_content to the turn, or set data.template to one whose generation prompt does not "
                    f"open {OPEN_THINKING}.",
                )

    def opened(self, example: Example) -> Example:
        """Return the row with `<think>` added to each assistant turn whose content closes a thinking it never opens."""
        if self.prompt_opens or not example.messages:
            return example
        return example.with_turns(_opened)


def thinking_marks(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ThinkingMarks:
    """Return what a template does with the marks of thinking."""
    known = OPEN_THINKING in template.source or CLOSE_THINKING in template.source
    known = known or CLOSE_THINKING in tokenizer.get_added_vocab()
    try:
        tail = template.prompt(QUESTION)[len(template.text(QUESTION)) :]
    except (TemplateError, BadRowError):
        # Some templates refuse a lone question, and the rows are proven one by one.
        tail = ""
    return ThinkingMarks(known, tail.rfind(OPEN_THINKING) > tail.rfind(CLOSE_THINKING))


def _first_mark(content: str) -> str:
    mark = MARK.search(content)
    return mark[0] if mark else ""


def _opened(message: Message) -> Message:
    content = message.content
    if message.role != "assistant" or message.thinking is not None or _first_mark(content) != CLOSE_THINKING:
        return message
    return replace(message, content=f"{OPEN_THINKING}{'' if content.startswith(chr(10)) else chr(10)}{content}")


def _half(message: Message, number: int, content: str, mark: re.Match[str]) -> BadRowError:
    if mark[0] == OPEN_THINKING:
        return BadRowError(
            f"the thinking of turn {number} begins and does not end: {excerpt(content, mark.start())}",
            "the model would learn to think without an end, and the start of the answer is unknown.",
            f"write {CLOSE_THINKING} where the thinking ends, or remove {OPEN_THINKING}.",
        )
    fix = f"write {OPEN_THINKING} where the thinking begins; or set data.half_thinking to open, which adds it."
    if message.thinking is not None:
        fix = f"remove {CLOSE_THINKING} from content, as reasoning_content holds the thinking."
    elif _first_mark(content) != CLOSE_THINKING:
        fix = f"remove one {CLOSE_THINKING}, or write {OPEN_THINKING} where the thinking begins."
    return BadRowError(
        f"the thinking of turn {number} ends and does not begin: {excerpt(content, mark.start())}",
        "the model would learn to write its thinking as an answer.",
        fix,
    )
