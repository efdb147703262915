"""Find the trained turns in a chat's text: by the template's markers, or by rendering prefixes of the chat."""

from __future__ import annotations

from typing import NamedTuple

from jinja2 import TemplateError

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.render.chat_template import ChatTemplate, Span
from packhorse.data.render.turns import Turn


class TurnSpan(NamedTuple):
    """Characters [start, end) of a trained turn, and the turn's index among the messages."""

    place: int
    start: int
    end: int


def render_chat(
    template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, trained: list[int]
) -> tuple[str, list[TurnSpan]]:
    """Return the text of a chat and the spans of its trained turns, in order.

    An answer begins where its generation prompt ends. Another turn begins with its content.

    Raises:
        TemplateError: The template refuses the chat.
        BadRowError: A trained turn cannot be located in the text.
    """
    text, marked = template.render(turns, tools)
    known: dict[int, Span] = {}
    if template.has_markers:
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(answers) != len(marked):
            raise _wrong_marks(len(answers), len(marked), text)
        known = dict(zip(answers, marked))
    spans = []
    for place in trained:
        span = known.get(place)
        if span is None:
            if turns[place]["role"] != "assistant" and not turns[place]["content"].strip():
                continue  # the turn is empty
            find = _answer_span if turns[place]["role"] == "assistant" else _content_span
            span = find(template, turns, tools, place, text)
        spans.append(TurnSpan(place, *span))
    return text, spans


def _answer_span(template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str) -> Span:
    """Return the span from the end of a turn's generation prompt to its last character that is not white space.

    Raises:
        BadRowError: The text does not begin with the prompt, or not with the turns up to this one.
    """
    prompt = template.prompt(turns[:place], tools)
    if not text.startswith(prompt):
        raise _rewritten(template, turns, tools, place, text, prompt)
    whole = text if place == len(turns) - 1 else template.text(turns[: place + 1], tools)
    if not text.startswith(whole) or len(whole) < len(prompt):
        raise _rewritten(template, turns, tools, place, text, whole)
    return len(prompt), max(len(prompt), len(whole.rstrip()))


def _content_span(template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str) -> Span:
    """Return the span of a user, system or tool turn's content and the template's marks after it.

    Raises:
        BadRowError: The text does not begin with the turns before or up to this one.
    """
    before = template.text(turns[:place], tools) if place else ""
    upto = text if place == len(turns) - 1 else template.text(turns[: place + 1], tools)
    start = text.find(turns[place]["content"].strip(), len(before), len(upto))
    if not text.startswith(before) or not text.startswith(upto) or start < 0:
        raise _rewritten(template, turns, tools, place, text, upto)
    return start, max(start, len(upto.rstrip()))


def _wrong_marks(num_answers: int, num_marks: int, text: str) -> BadRowError:
    return BadRowError(
        f"the chat has {num_answers} assistant turns, and the template marks {num_marks} as generated: {excerpt(text)}",
        "a turn without its mark would not be trained on, and a mark without a turn trains other text.",
        "put {% generation %} and {% endgeneration %} around each assistant turn, once.",
    )


def _rewritten(
    template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str, prefix: str
) -> BadRowError:
    at = next((at for at, (here, alone) in enumerate(zip(text, prefix)) if here != alone), min(len(text), len(prefix)))
    fixes = ["copy the template to a file with {% generation %} markers and name it in data.template"]
    if _last_answer_works(template, turns, tools, place, text):
        fixes.insert(0, "set data.train_on.turns to last, whose answer the template does not change")
    if any(turn.get("reasoning_content") or "<think>" in turn["content"] for turn in turns):
        fixes.insert(0, "set data.train_on.thinking to remove")
    return BadRowError(
        f"the chat template writes turn {place + 1} ({turns[place]['role']}) differently when more turns follow, or "
        f"differently from its generation prompt: here {excerpt(text, at)}, alone {excerpt(prefix, at)}",
        "a served model sees only the prompt, so it would be trained on other text than it sees in use.",
        "; or ".join(fixes) + ".",
    )


def _last_answer_works(
    template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str
) -> bool:
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant" or number == 0)
    try:
        return last > place and text.startswith(template.prompt(turns[:last], tools))
    except TemplateError:
        return False
