"""The rows that a comparison is made on, and which of them are answered."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from packhorse.data.packs.store import PackStore, open_store
from packhorse.errors import UserError
from packhorse.evaluate.generate import Message, Tools
from packhorse.evaluate.turns import Form
from packhorse.recipe.schema import EvaluationSection

NO_GROUP: Final = "(none)"
SETS: Final = ("validation", "retain")


@dataclass(frozen=True)
class Question:
    """A row that can be answered: the chat up to its last assistant turn, with the true history.

    Attributes:
        row: Index of the document.
        prompt: Messages before the answer.
        answer: The turn that is expected there.
        key: Hash of the content: the order in which rows are chosen.
        tools: What the assistant may call.
    """

    row: int
    prompt: tuple[Message, ...]
    answer: Message
    key: str
    tools: Tools = ()


@dataclass(frozen=True)
class HeldOut:
    """A set of held-out rows.

    Attributes:
        name: validation, retain or test.
        documents: Their tokens.
        rows: Row of each document, from 0; a text longer than a pack may have become several documents.
        groups: Group of each document.
        questions: Rows to be answered.
    """

    name: str
    documents: PackStore
    rows: tuple[int, ...]
    groups: tuple[str, ...]
    questions: tuple[Question, ...]


def read_sets(data_folder: Path, settings: EvaluationSection, form: Form) -> list[HeldOut]:
    """Reads the validation rows and, where there are any, the retain rows; never the test rows.

    Args:
        data_folder: Prepared data, with data.json.
        settings: Of the recipe: what makes the groups, and how many rows are answered.
        form: As rows were trained.

    Raises:
        UserError: There are neither.
    """
    found = [read_held_out(data_folder, name, settings, form) for name in SETS]
    sets = [held_out for held_out in found if held_out is not None]
    if not sets:
        raise UserError(
            f"{data_folder} has 0 validation rows and 0 retain rows.",
            "a model is judged on rows that it was not trained on.",
            "raise data.split.validation, or name rows in data.validation, and train again.",
        )
    return sets


def read_held_out(data_folder: Path, name: str, settings: EvaluationSection, form: Form) -> HeldOut | None:
    """Reads a set from prepared data; None where it has no rows.

    Args:
        data_folder: Prepared data, with data.json.
        name: validation or retain.
        settings: Of the recipe: what makes the groups, and how many rows are answered.
        form: As rows were trained.

    Raises:
        ValueError: The set is another one; the test rows are opened by `data.seal` alone.
    """
    if name not in SETS:
        raise ValueError(f"{name} is none of {', '.join(SETS)}")
    if not (data_folder / name).is_dir():
        return None
    documents = open_store(data_folder, name)
    return None if documents.num_documents == 0 else held_out_of(documents, name, settings, form)


def held_out_of(documents: PackStore, name: str, settings: EvaluationSection, form: Form) -> HeldOut:
    """Reads the rows of an open store.

    Args:
        documents: One or more documents, with their rows.
        name: What the set is called.
        settings: Of the recipe: what makes the groups, and how many rows are answered.
        form: As rows were trained.
    """
    group_by = settings.group_by
    found = list(documents.rows())
    assert len(found) == documents.num_documents, f"{len(found)} rows for {documents.num_documents} documents"
    groups = tuple(str(row["fields"].get(group_by, NO_GROUP)) if group_by else name for row in found)
    questions = [question for index, row in enumerate(found) if (question := _question(index, row)) is not None]
    chosen = choose(questions, groups, settings.exact_match_rows)
    asked = tuple(_as_trained(question, found[question.row], form) for question in chosen)
    return HeldOut(name, documents, _rows_of(found), groups, asked)


def choose(questions: Sequence[Question], groups: Sequence[str], limit: int) -> tuple[Question, ...]:
    """Chooses rows from every group in turn, by a hash of their content: the file's order does not matter.

    Args:
        questions: All rows that can be answered.
        groups: Group of each row of the set.
        limit: How many are chosen, at most.
    """
    waiting: defaultdict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: question.key):
        waiting[groups[question.row]].append(question)
    rounds = [(place, group) for group, found in waiting.items() for place in range(len(found))]
    return tuple(waiting[group][place] for place, group in sorted(rounds)[:limit])


def _rows_of(found: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Only plain text becomes several documents; they follow each other and stand at one place of one file."""
    rows = [0]
    for before, row in pairwise(found):
        is_next_piece = not row.get("messages") and row["where"] == before["where"]
        rows.append(rows[-1] + (not is_next_piece))
    return tuple(rows)


def _question(index: int, row: Mapping[str, Any]) -> Question | None:
    messages = row.get("messages") or ()
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        return None
    tools = tuple(row.get("tools") or ())
    content = json.dumps([messages[: last + 1], tools] if tools else messages[: last + 1], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    return Question(index, tuple(messages[:last]), messages[last], key, tools)


def _as_trained(question: Question, row: Mapping[str, Any], form: Form) -> Question:
    turns, tools = form(row)
    last = len(question.prompt)
    return replace(question, prompt=tuple(turns[:last]), answer=turns[last], tools=tools)
