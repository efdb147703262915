"""What a template leaves out, rewrites or puts in the wrong place: each turn's words must stand in the text."""

from __future__ import annotations

from typing import Any

from packhorse.data.render.refusal import RowRefusedError, excerpt
from packhorse.data.render.spans import TurnSpan
from packhorse.data.render.turns import CLOSE_THINKING, Turn, json_text


def check_contents(text: str, turns: list[Turn], tools: list[Turn] | None, spans: list[TurnSpan]) -> None:
    """Prove that a trained turn's words stand inside its span, and every other turn's outside of all spans.

    White space at the ends of what is said may go, as some published templates trim it.

    Raises:
        RowRefusedError: The template leaves something out, rewrites it, or would train on what it should not.
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
            found = text.find(content, at)
            if found < 0 or (span is not None and found + len(content) > span.start):
                _check_outside(text, turn, place, spans)
            else:
                at = found + len(content)
        if len(turn) > 2:
            _check_rare_fields(text, turn, place, spans)
    for tool in tools or ():
        _check_tool(text, tool)


def _check_outside(text: str, turn: Turn, place: int, spans: list[TurnSpan]) -> None:
    """Look everywhere, as a template may move a system turn."""
    content = turn["content"].strip()
    at = text.find(content)
    if at < 0:
        _check_rewritten(text, turn, place)
        return
    while at >= 0:
        if not any(at < span.end and span.start < at + len(content) for span in spans):
            return
        at = text.find(content, at + 1)
    raise RowRefusedError(
        f"the text of turn {place + 1} ({turn['role']}) is trained on: {excerpt(turn['content'])}",
        "the model would learn to write the prompt.",
        "let the template's generation markers hold what the assistant says and its stop token, nothing else.",
    )


def _check_rewritten(part: str, turn: Turn, place: int) -> None:
    """Pass what a template may do: JSON around a tool's answer, thinking set apart from the answer."""
    content = turn["content"].strip()
    if turn["role"] == "tool" and any(form in part for form in json_text(content)):
        return
    if turn["role"] == "assistant" and CLOSE_THINKING in content:
        content = content.rpartition(CLOSE_THINKING)[2].strip()
        if content in part:
            return
    raise _left_out(f"what turn {place + 1} ({turn['role']}) says", turn["content"])


def _check_rare_fields(text: str, turn: Turn, place: int, spans: list[TurnSpan]) -> None:
    span = next((span for span in spans if span.place == place), None)
    part = text[span.start : span.end] if span else text
    thinking = turn.get("reasoning_content", "").strip()
    # Many templates leave out what was thought in earlier turns, and are served so.
    if span is not None and thinking not in part:
        raise _left_out(f"the thinking of turn {place + 1}", thinking)
    for call in turn.get("tool_calls", ()):
        _check_call(part, call.get("function", call), place)


def _check_call(part: str, call: dict[str, Any], place: int) -> None:
    arguments = call.get("arguments")
    words = [call.get("name", ""), *(arguments if isinstance(arguments, dict) else ())]
    for word in words:
        if not any(form in part for form in json_text(str(word))):
            raise _left_out(f"{word!r} of a tool call in turn {place + 1}", str(call))


def _check_tool(text: str, tool: dict[str, Any]) -> None:
    name = tool.get("function", tool).get("name", "")
    if name not in text:
        raise _left_out(f"the tool definition {name}", str(tool))


def _left_out(what: str, shown: str) -> RowRefusedError:
    return RowRefusedError(
        f"the chat template leaves out or rewrites {what}: {excerpt(shown)}",
        "left out of the text, it would change silently what the row teaches.",
        "set data.template to one that writes it (chatml has a form for tools and thinking), or take it out of the "
        "row.",
    )
