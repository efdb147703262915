"""Prove that a template neither omits, rewrites nor misplaces what a row says."""

from __future__ import annotations

from typing import Any

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.render.spans import TurnSpan
from packhorse.data.render.turns import CLOSE_THINKING, Turn, json_text


def check_contents(text: str, turns: list[Turn], tools: list[Turn] | None, spans: list[TurnSpan]) -> None:
    """Prove that each trained turn's text is inside its span, and the text of every other turn outside all spans.

    White space at the ends of a turn may be missing, as some published templates trim it.

    Raises:
        BadRowError: The template omits or rewrites something, or would train on other text than the answer.
    """
    own = iter(spans)
    span = next(own, None)
    at = 0
    for place, turn in enumerate(turns):
        content = turn["content"].strip()
        if span is not None and span.place == place:
            if text.find(content, span.start, span.end) < 0:
                _check_rewritten(text[span.start : span.end], turn, place)
            at = span.end
            span = next(own, None)
        else:
            start = text.find(content, at)
            if start < 0 or (span is not None and start + len(content) > span.start):
                _check_outside(text, turn, place, spans)
            else:
                at = start + len(content)
        if len(turn) > 2:
            _check_rare_fields(text, turn, place, spans)
    for tool in tools or ():
        _check_tool(text, tool)


def _check_outside(text: str, turn: Turn, place: int, spans: list[TurnSpan]) -> None:
    """Search the whole text for an untrained turn, as a template may move a system turn."""
    content = turn["content"].strip()
    at = text.find(content)
    if at < 0:
        _check_rewritten(text, turn, place)
        return
    while at >= 0:
        if not any(at < span.end and span.start < at + len(content) for span in spans):
            return
        at = text.find(content, at + 1)
    raise BadRowError(
        f"the text of turn {place + 1} ({turn['role']}) is trained on: {excerpt(turn['content'])}",
        "the model would learn to write the prompt.",
        "put only the assistant's text and its stop token inside the template's generation markers.",
    )


def _check_rewritten(part: str, turn: Turn, place: int) -> None:
    """Accept what a template may do: JSON around a tool's answer, thinking separated from the answer."""
    content = turn["content"].strip()
    if turn["role"] == "tool" and any(form in part for form in json_text(content)):
        return
    if turn["role"] == "assistant" and CLOSE_THINKING in content:
        content = content.rpartition(CLOSE_THINKING)[2].strip()
        if content in part:
            return
    raise _omitted(f"the text of turn {place + 1} ({turn['role']})", turn["content"])


def _check_rare_fields(text: str, turn: Turn, place: int, spans: list[TurnSpan]) -> None:
    span = next((span for span in spans if span.place == place), None)
    part = text[span.start : span.end] if span else text
    thinking = turn.get("reasoning_content", "").strip()
    # Many templates omit the thinking of earlier turns, in serving too.
    if span is not None and thinking not in part:
        raise _omitted(f"the thinking of turn {place + 1}", thinking)
    for call in turn.get("tool_calls", ()):
        _check_call(part, call.get("function", call), place)
    # The name of a tool that answers is that of the call.
    if turn["role"] != "tool" and turn.get("name", "") not in text:
        raise BadRowError(
            f"the chat template omits the name of turn {place + 1}: {excerpt(turn['name'])}",
            "without it, nobody knows who speaks.",
            "set data.template to one that writes it, or the source's ignore: [name] to train without it.",
        )


def _check_call(part: str, call: dict[str, Any], place: int) -> None:
    arguments = call.get("arguments")
    words = [call.get("name", ""), *(arguments if isinstance(arguments, dict) else ())]
    for word in words:
        if not any(form in part for form in json_text(str(word))):
            raise _omitted(f"{word!r} of a tool call in turn {place + 1}", str(call))


def _check_tool(text: str, tool: dict[str, Any]) -> None:
    name = tool.get("function", tool).get("name", "")
    if name not in text:
        raise _omitted(f"the tool definition {name}", str(tool))


def _omitted(what: str, content: str) -> BadRowError:
    return BadRowError(
        f"the chat template omits or rewrites {what}: {excerpt(content)}",
        "without it, the row would silently teach something else.",
        "set data.template to one that writes it (chatml supports tools and thinking), or remove it from the row.",
    )
