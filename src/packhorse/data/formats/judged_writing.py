"""Write rows with a rejected answer or a verdict: as preference pairs, as KTO rows, or the good answers as chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from packhorse.data.formats.bad_row import BadRowError
from packhorse.data.formats.detect import VERDICT_KEYS
from packhorse.data.formats.example import Example
from packhorse.data.formats.preference import ANSWER_KEYS
from packhorse.data.formats.writing import to_messages, turn_of, with_others

Rows = list[dict[str, Any]]
PAIR_KEYS = ANSWER_KEYS | {"prompt"}


def to_preference(example: Example, others: Mapping[str, Any]) -> Rows:
    """Return a row with `prompt`, `chosen` and `rejected`, each a list of turns.

    Raises:
        BadRowError: The row has no rejected answer.
    """
    if example.rejected is None:
        raise _has_no("rejected answer", "a pair", "sft" if example.desirable is None else "kto")
    cut = example.num_prompt_turns
    turns = [turn_of(message) for message in example.messages or ()]
    row: dict[str, Any] = {
        "prompt": [_without_mark(turn) for turn in turns[:cut]],
        "chosen": turns[cut:],
        "rejected": [turn_of(message) for message in example.rejected],
    }
    return [with_others(_with_tools(row, example), others, "preference", PAIR_KEYS)]


def to_kto(example: Example, others: Mapping[str, Any]) -> Rows:
    """Return a row with `messages` and `label`; two for a preference pair, the chosen answer first.

    Raises:
        BadRowError: The row has neither a rejected answer nor a verdict.
    """
    if example.rejected is not None:
        judged = [(replace(example, rejected=None), True), (example.rejected_chat, False)]
    elif example.desirable is not None:
        judged = [(example, example.desirable)]
    else:
        raise _has_no("verdict", "a KTO row", "sft")
    rows: Rows = []
    for chat, good in judged:
        turns = [_without_mark(turn_of(message)) for message in chat.messages or ()]
        row = _with_tools({"messages": turns, "label": good}, example)
        rows.append(with_others(row, others, "kto", frozenset((*row, *VERDICT_KEYS))))
    return rows


def to_chosen(example: Example, others: Mapping[str, Any]) -> Rows:
    """Return the chosen or the good answer as a row of `messages`; none for a bad answer.

    Raises:
        BadRowError: The row has neither a rejected answer nor a verdict.
    """
    if example.rejected is None and example.desirable is None:
        raise _has_no("rejected answer or verdict", "a choice", "sft")
    if example.desirable is False:
        return []
    return [to_messages(replace(example, rejected=None, desirable=None), others)]


def _without_mark(turn: dict[str, Any]) -> dict[str, Any]:
    """Remove `train: false` of the prompt, which the format of the row says anyway."""
    return {key: value for key, value in turn.items() if key != "train"}


def _with_tools(row: dict[str, Any], example: Example) -> dict[str, Any]:
    return row | {"tools": list(example.tools)} if example.tools else row


def _has_no(what: str, form: str, objective: str) -> BadRowError:
    return BadRowError(
        f"the row has no {what}.",
        f"{form} needs it.",
        f"name rows that have it; these can be trained on with objective {objective}.",
    )
