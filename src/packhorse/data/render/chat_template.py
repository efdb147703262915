"""A chat template, compiled once: it renders messages as text, with the spans that it marks as generated.

The text equals that of `apply_chat_template`, as the environment is transformers' own. Only the `generation` tag is
replaced: transformers' tracker costs ten times as much as the rest of a short chat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from packhorse.data.render.clock import CLOCK, TIMES, Clock, ClockError

GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Errors of a template on a row that it was not written for, such as None + str.
_SLIPS: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
# Removed from the text after rendering; random, so that no row can contain them.
_OPEN: Final = f"\0open {uuid4()}\0"
_CLOSE: Final = f"\0close {uuid4()}\0"

Span = tuple[int, int]
Turns = Sequence[Mapping[str, Any]]


class _Markers(Extension):
    """Renders `{% generation %}…{% endgeneration %}` as its content between two marks."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own form
    priority = 1000  # after transformers' extension of the same tag, whose place it takes

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes of the content with a mark before and after."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE))
        return [before, *body, after]


class ChatTemplate:
    """Chat template of one tokenizer.

    Attributes:
        source: Jinja text.
        has_markers: Whether the template marks what is generated.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compile the template; raise TemplateError if it is not a Jinja template."""
        self.source = source
        self.has_markers = GENERATION.search(source) is not None
        environment = _compile_jinja_template(source).environment.overlay(extensions=[_Markers])
        self._clock = Clock()
        template = environment.from_string(source, globals={CLOCK: self._clock})
        self._root = template.root_render_func
        known = {"messages": None, "tools": None, "documents": None, "add_generation_prompt": False}
        # One context for all rows: creating a context costs more than rendering a short chat.
        self._context = template.new_context({**known, **tokenizer.special_tokens_map})

    def render(self, turns: Turns, tools: Turns | None = None) -> tuple[str, list[Span]]:
        """Return a chat's text, and the character spans [start, end) that the template marks.

        Raises:
            TemplateError: The template refuses the chat, or its markers are nested.
            ClockError: The text depends on the current date.
        """
        first, *rest = self._render(turns, tools, prompt=False).split(_OPEN)
        if not rest:
            return first, []
        pieces, spans, at = [first], [], len(first)
        for part in rest:
            inside, mark, after = part.partition(_CLOSE)
            if not mark:
                raise TemplateError("its generation markers are nested")
            spans.append((at, at + len(inside)))
            pieces += (inside, after)
            at += len(inside) + len(after)
        return "".join(pieces), spans

    def prompt(self, turns: Turns, tools: Turns | None = None) -> str:
        """Return the text after which an answer to these turns is generated; raise TemplateError if refused."""
        return self._render(turns, tools, prompt=True).replace(_OPEN, "").replace(_CLOSE, "")

    def text(self, turns: Turns, tools: Turns | None = None) -> str:
        """Return the text of these turns alone; raise TemplateError if the template refuses them."""
        return self._render(turns, tools, prompt=False).replace(_OPEN, "").replace(_CLOSE, "")

    def _render(self, turns: Turns, tools: Turns | None, prompt: bool) -> str:
        self._context.parent.update(messages=turns, tools=tools, add_generation_prompt=prompt)
        text = self._write()
        if self._clock.was_read:
            self._check_clock(text)
        return text

    def _check_clock(self, text: str) -> None:
        """Raise ClockError if the text is another one at another time."""
        clock = self._clock
        clock.now = TIMES[1]
        later = self._write()
        clock.now, clock.was_read = TIMES[0], False
        if later != text:
            at = next((at for at, (one, other) in enumerate(zip(text, later)) if one != other), 0)
            clock.now = datetime.now()
            raise ClockError(self._write(), at)

    def _write(self) -> str:
        context = self._context
        # Remove what the template set while it rendered the last row.
        context.vars.clear()
        context.exported_vars.clear()
        try:
            return "".join(self._root(context))
        except _SLIPS as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
