"""Where in a chat's text its trained turns stand: by the template's markers, else by rendering prefixes."""

from __future__ import annotations

from typing import NamedTuple

from jinja2 import TemplateError

from packhorse.data.render.draw import ChatTemplate, Span
from packhorse.data.render.refusal import RowRefusedError, excerpt
from packhorse.data.render.turns import Turn


class TurnSpan(NamedTuple):
    """The characters [start, end) of a trained turn, and its place among the messages."""

    place: int
    start: int
    end: int


def draw_chat(
    template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, trained: list[int]
) -> tuple[str, list[TurnSpan]]:
    """Return the text of a chat and the spans of its trained turns, in their order.

    An answer begins where its generation prompt ends. Another turn begins with what is said in it.

    Raises:
        TemplateError: The template refuses the chat.
        RowRefusedError: A trained turn cannot be told from the rest.
    """
    text, marked = template.draw(turns, tools)
    known: dict[int, Span] = {}
    if template.has_markers:
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(answers) != len(marked):
            raise _other_marks(len(answers), len(marked), text)
        known = dict(zip(answers, marked))
    spans = []
    for place in trained:
        span = known.get(place)
        if span is None:
            if turns[place]["role"] != "assistant" and not turns[place]["content"].strip():
                continue  # nothing is said, so nothing begins
            find = _answer_span if turns[place]["role"] == "assistant" else _said_span
            span = find(template, turns, tools, place, text)
        spans.append(TurnSpan(place, *span))
    return text, spans


def _answer_span(template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str) -> Span:
    """Return what follows the generation prompt of a turn, up to the turn's last character that is no white space.

    Raises:
        RowRefusedError: The text does not begin with the prompt, or not with the turns up to this one.
    """
    prompt = template.prompt(turns[:place], tools)
    if not text.startswith(prompt):
        raise _rewritten(template, turns, tools, place, text, prompt)
    whole = text if place == len(turns) - 1 else template.text(turns[: place + 1], tools)
    if not text.startswith(whole) or len(whole) < len(prompt):
        raise _rewritten(template, turns, tools, place, text, whole)
    return len(prompt), max(len(prompt), len(whole.rstrip()))


def _said_span(template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str) -> Span:
    """Return what is said in a turn of the user, the system or a tool, and the template's marks after it.

    Raises:
        RowRefusedError: The text does not begin with the turns before or up to this one.
    """
    before = template.text(turns[:place], tools) if place else ""
    upto = text if place == len(turns) - 1 else template.text(turns[: place + 1], tools)
    start = text.find(turns[place]["content"].strip(), len(before), len(upto))
    if not text.startswith(before) or not text.startswith(upto) or start < 0:
        raise _rewritten(template, turns, tools, place, text, upto)
    return start, max(start, len(upto.rstrip()))


def _other_marks(num_answers: int, num_marks: int, text: str) -> RowRefusedError:
    return RowRefusedError(
        f"the chat has {num_answers} assistant turns, and the template marks {num_marks} as generated: {excerpt(text)}",
        "a turn without its mark would not be learnt, and a mark without a turn trains something else.",
        "put {% generation %} and {% endgeneration %} around each assistant turn, once.",
    )


def _rewritten(
    template: ChatTemplate, turns: list[Turn], tools: list[Turn] | None, place: int, text: str, prefix: str
) -> RowRefusedError:
    at = next((at for at, (here, alone) in enumerate(zip(text, prefix)) if here != alone), min(len(text), len(prefix)))
    fixes = ["copy the template to a file with {% generation %} markers and name it in data.template"]
    if _last_answer_works(template, turns, tools, place, text):
        fixes.insert(0, "set data.train_on.turns to last, whose answer it leaves as it is")
    if any(turn.get("reasoning_content") or "<think>" in turn["content"] for turn in turns):
        fixes.insert(0, "set data.train_on.thinking to remove")
    return RowRefusedError(
        f"the chat template writes turn {place + 1} ({turns[place]['role']}) otherwise when more follows, or than "
        f"its generation prompt begins it: here {excerpt(text, at)}, alone {excerpt(prefix, at)}",
        "a served model sees the prompt alone; it would be trained on another text than it meets.",
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
