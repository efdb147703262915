"""Answers with a verdict: pairs of a chosen and a rejected answer, and single answers (KTO)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, excerpt, shown
from packhorse.data.formats.chats import check_chat, empty_answer, is_blank, with_system
from packhorse.data.formats.content import one_of, other_fields
from packhorse.data.formats.detect import NAMES_OF, SYSTEM_KEYS, VERDICT_KEYS
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.single_turn import (
    PROMPT_PARTS,
    answer_turns,
    check_speaker,
    is_turns,
    prompt_turns,
    text_prompt,
    turns_of,
)
from packhorse.data.formats.tools import TOOL_KEYS, tools_of
from packhorse.data.formats.turns import context_of, messages_of, refuse_trained, turn_list
from packhorse.data.read.row import Row

PROMPT_KEYS: Final = ("prompt", "messages", "conversations", "instruction", "question")
# Chats written as one text, as in Anthropic's hh-rlhf.
BEGINNING: Final = re.compile(r"\s*Human:")
SPEAKER: Final = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES: Final = {"Human": "user", "Assistant": "assistant"}
ANSWER_KEYS: Final = frozenset(("chosen", "rejected", *SYSTEM_KEYS, *TOOL_KEYS))


def from_preference(row: Row) -> Example:
    """Return the example of a row with `chosen` and `rejected`.

    The prompt is in `prompt`, `messages`, `conversations`, `instruction` or `question`; or chosen and rejected are
    whole chats with a common beginning (TRL's implicit prompt). Its turns are context, whatever their role.
    """
    values = row.values
    prompt, keys = _prompt(values)
    chosen, rejected = _answer(values, "chosen"), _answer(values, "rejected")
    # An answer begins with the assistant; a list that begins with another role is a whole chat.
    if chosen[0].role != "assistant" and rejected[0].role != "assistant":
        # A system text next to the chats is added to both below.
        prompt = _common_beginning(chosen, rejected, prompt[1:] if one_of(values, SYSTEM_KEYS) else prompt)
        for key in ("chosen", "rejected"):
            if not _is_transcript(values[key]):
                refuse_trained(values[key][: len(prompt)], key)
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
    used = ANSWER_KEYS | keys
    fields = other_fields(row.values, used)
    answers = (*context, *chosen), tuple(rejected)
    return Example(answers[0], None, fields, row.where, tools, answers[1], used=used, num_prompt_turns=len(context))


def from_kto(row: Row) -> Example:
    """Return the example of a row with one answer and its verdict in `label` or `kto_tag`.

    The answer is `completion`, or the assistant's last text in `messages` or `conversations`; the turns before it are
    context, whatever their role.
    """
    values = row.values
    messages, keys = _judged_chat(values)
    tools = tools_of(values)
    check_chat(messages, tools)
    desirable = _verdict(values)
    used = frozenset((*VERDICT_KEYS, *keys, *SYSTEM_KEYS, *TOOL_KEYS))
    fields = other_fields(values, used)
    return Example(tuple(messages), None, fields, row.where, tools, None, desirable, used=used)


def _prompt(values: dict[str, Any]) -> tuple[list[Message], frozenset[str]]:
    """Return the prompt, and the keys that it was read from."""
    # A column may exist but be empty in files merged from several formats.
    key = next((key for key in PROMPT_KEYS if values.get(key) is not None and values[key] != ""), None)
    if key is None:
        return [], frozenset()
    if _is_transcript(values[key]):
        return with_system(values, _transcript_turns(values[key])), frozenset((key,))
    if key in ("messages", "conversations"):
        return with_system(values, context_of(values[key], key)), frozenset((key,))
    if key == "prompt" and is_turns(values[key]):
        return prompt_turns(values), frozenset((key,))
    return text_prompt(values, key), frozenset((key, *PROMPT_PARTS))


def _answer(values: dict[str, Any], key: str) -> list[Message]:
    return _transcript_turns(values[key]) if _is_transcript(values[key]) else turns_of(values[key], key)


def _common_beginning(chosen: list[Message], rejected: list[Message], prompt: Sequence[Message]) -> list[Message]:
    """Return the common first turns of two whole chats; a separate prompt must be among them."""
    pairs = list(zip(chosen, rejected))
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    # The last turn is an answer, even if both chats have the same one.
    common = chosen[: min(same, len(chosen) - 1, len(rejected) - 1)]
    context = [replace(turn, trained=False) for turn in common]
    apart = [turn for turn in prompt if replace(turn, trained=False) not in context]
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


def _judged_chat(values: dict[str, Any]) -> tuple[list[Message], frozenset[str]]:
    """Return the turns, of which those before the judged answer are context, and the keys that they were read from."""
    key = next(key for key in ("prompt", "messages", "conversations") if key in values)
    if key == "prompt":
        answer = one_of(values, NAMES_OF["completion"]) or "completion"
        prompt, keys = _prompt(values)
        context = [replace(turn, trained=False) for turn in prompt]
        return [*context, *answer_turns(values.get(answer), answer)], keys | {*NAMES_OF["completion"]}
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
    given = turn_list(values[key], key)
    refuse_trained(given[: max(0, last_prompt + 1 - (len(turns) - len(given)))], key)
    judged = [turn if at > last_prompt else replace(turn, trained=False) for at, turn in enumerate(turns)]
    return judged, frozenset((key,))


def _verdict(values: dict[str, Any]) -> bool:
    key = one_of(values, VERDICT_KEYS) or next(key for key in VERDICT_KEYS if key in values)
    verdict = values[key]
    if not isinstance(verdict, bool):
        raise BadRowError(f"{key} is {shown(verdict)}.", "it says whether the answer is good.", "write true or false.")
    return verdict


def _is_transcript(value: object) -> bool:
    """Return whether a value is a text that begins with `Human:` and has a turn of the assistant."""
    return isinstance(value, str) and BEGINNING.match(value) is not None and "\n\nAssistant:" in value


def _transcript_turns(text: str) -> list[Message]:
    """Return the turns of a transcript; without the last one where it is empty, as in a prompt.

    Raises:
        BadRowError: Another turn is empty.
    """
    _, *parts = SPEAKER.split(text.strip())
    turns = [Message(ROLES[speaker], said.strip()) for speaker, said in zip(parts[::2], parts[1::2])]
    if not turns[-1].content:
        turns.pop()
    empty = next((number for number, turn in enumerate(turns, 1) if not turn.content), None)
    if empty is not None:
        raise BadRowError(
            f"turn {empty} of the transcript is empty: {excerpt(text)}",
            "nobody answers nothing.",
            "fill it in, or remove the row.",
        )
    return turns
