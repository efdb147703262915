"""Answers with a verdict: pairs of a chosen and a rejected answer, and single answers (KTO). Not trained on yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, shown
from packhorse.data.formats.chats import check_chat, empty_answer, is_blank, with_system
from packhorse.data.formats.content import other_fields, text_of
from packhorse.data.formats.detect import VERDICT_KEYS
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.single_turn import (
    alpaca_prompt,
    answer_turns,
    check_speaker,
    prompt_turns,
    turns_of,
)
from packhorse.data.formats.tools import TOOL_KEYS, tools_of
from packhorse.data.formats.turns import messages_of
from packhorse.data.read.row import Row

PROMPT_KEYS: Final = ("prompt", "messages", "conversations", "instruction", "question")
PREFERENCE_KEYS: Final = frozenset((*PROMPT_KEYS, "input", "history", "system", "chosen", "rejected", *TOOL_KEYS))
KTO_KEYS: Final = frozenset(("prompt", "completion", "messages", "conversations", "system", *VERDICT_KEYS, *TOOL_KEYS))


def from_preference(row: Row) -> Example:
    """Return the example of a row with `chosen` and `rejected`.

    The prompt is in `prompt`, `messages`, `conversations`, `instruction` or `question`; or chosen and rejected are
    whole chats with a common beginning (TRL's implicit prompt). Its turns are context, whatever their role.
    """
    values = row.values
    prompt = _prompt(values)
    chosen, rejected = turns_of(values["chosen"], "chosen"), turns_of(values["rejected"], "rejected")
    # An answer begins with the assistant; a list that begins with another role is a whole chat.
    if chosen[0].role != "assistant" and rejected[0].role != "assistant":
        prompt = _common_beginning(chosen, rejected, prompt)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRowError(
            "the row has chosen and rejected, and no prompt.",
            "an answer is better or worse only as an answer to something.",
            "add prompt, or write chosen and rejected as whole chats with a common beginning.",
        )
    if chosen == rejected:
        raise BadRowError(
            "chosen and rejected are equal.", "such a pair does not say which is better.", "remove the row."
        )
    context = [replace(turn, trained=False) for turn in with_system(values, prompt)]
    tools = tools_of(values)
    for answer, key in ((chosen, "chosen"), (rejected, "rejected")):
        _check_answer(context, answer, key, tools)
    fields = other_fields(row.values, PREFERENCE_KEYS)
    return Example((*context, *chosen), None, fields, row.where, tools, tuple(rejected))


def from_kto(row: Row) -> Example:
    """Return the example of a row with one answer and its verdict in `label` or `kto_tag`.

    The answer is `completion`, or the assistant's last text in `messages` or `conversations`; the turns before it are
    context, whatever their role.
    """
    values = row.values
    messages = _judged_chat(values)
    tools = tools_of(values)
    check_chat(messages, tools)
    desirable = _verdict(values)
    return Example(tuple(messages), None, other_fields(values, KTO_KEYS), row.where, tools, None, desirable)


def _prompt(values: dict[str, Any]) -> list[Message]:
    # A column may exist but be empty in files merged from several formats.
    key = next((key for key in PROMPT_KEYS if values.get(key) is not None), None)
    if key is None:
        return []
    if key == "prompt":
        return prompt_turns(values)
    if key == "instruction":
        return alpaca_prompt(values)
    return [Message("user", text_of(values[key], key))] if key == "question" else messages_of(values[key], key)


def _common_beginning(chosen: list[Message], rejected: list[Message], prompt: Sequence[Message]) -> list[Message]:
    """Return the common first turns of two whole chats; a separate prompt must be among them."""
    pairs = list(zip(chosen, rejected))
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    # The last turn is an answer, even if both chats have the same one.
    common = chosen[: min(same, len(chosen) - 1, len(rejected) - 1)]
    contents = {(turn.role, turn.content) for turn in common}
    apart = [turn for turn in prompt if turn.role != "system" and (turn.role, turn.content) not in contents]
    if not common or apart:
        what = f"the prompt's turn {shown(apart[0].content)} is not among" if apart else "there is no turn in"
        raise BadRowError(
            f"chosen and rejected are whole chats, and {what} their common beginning.",
            "both must answer the same prompt.",
            "begin both with the same turns, or give only the answers.",
        )
    return common


def _check_answer(context: list[Message], answer: list[Message], key: str, tools: tuple[dict[str, Any], ...]) -> None:
    check_speaker(answer, key)
    if is_blank(answer[-1].content) and not answer[-1].tool_calls:
        raise BadRowError(f"{key} is empty.", "there is no answer to compare.", "fill it in, or remove the row.")
    check_chat([*context, *answer], tools)


def _judged_chat(values: dict[str, Any]) -> list[Message]:
    if "completion" in values:
        return [
            *(replace(turn, trained=False) for turn in prompt_turns(values)),
            *answer_turns(values["completion"], "completion"),
        ]
    key = "messages" if "messages" in values else "conversations"
    turns = with_system(values, messages_of(values[key], key))
    if turns[-1].role != "assistant":
        raise BadRowError(
            f"the chat ends with a turn of the role {turns[-1].role}.",
            "its last turn is the answer that the label is about.",
            "end it with the assistant's answer.",
        )
    # Tool calls and their results are part of the answer.
    last_prompt = max((at for at, turn in enumerate(turns) if turn.role in ("user", "system")), default=-1)
    if is_blank(turns[-1].content) and not turns[-1].tool_calls:
        raise empty_answer()
    return [turn if at > last_prompt else replace(turn, trained=False) for at, turn in enumerate(turns)]


def _verdict(values: dict[str, Any]) -> bool:
    key = next(key for key in VERDICT_KEYS if key in values)
    verdict = values[key]
    if not isinstance(verdict, bool):
        raise BadRowError(f"{key} is {shown(verdict)}.", "it says whether the answer is good.", "write true or false.")
    return verdict
