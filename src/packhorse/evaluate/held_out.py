"""The rows that a comparison is made on, and which of them are answered."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packhorse.data.packs.store import PackStore, open_store
from packhorse.evaluate.generate import Message

NO_GROUP: Final = "(none)"


@dataclass(frozen=True)
class Question:
    """A row that can be answered: the chat up to its last assistant turn, with the true history.

    Attributes:
        row: Index of the row.
        prompt: Messages before the answer.
        expected: What the assistant says there.
        key: Hash of the content: the order in which rows are chosen.
    """

    row: int
    prompt: tuple[Message, ...]
    expected: str
    key: str


@dataclass(frozen=True)
class HeldOut:
    """A set of held-out rows.

    Attributes:
        name: validation or retain.
        documents: Their tokens.
        groups: Group of each row.
        questions: Rows to be answered.
    """

    name: str
    documents: PackStore
    groups: tuple[str, ...]
    questions: tuple[Question, ...]


def read_held_out(data_folder: Path, name: str, group_by: str | None, num_questions: int) -> HeldOut | None:
    """Reads a set from prepared data; None where it has no rows.

    Args:
        data_folder: Prepared data, with data.json.
        name: validation or retain.
        group_by: Row field that makes the groups; None: one group.
        num_questions: Rows to be answered, at most.
    """
    if not (data_folder / name).is_dir():
        return None
    documents = open_store(data_folder, name)
    if documents.num_documents == 0:
        return None
    rows = list(documents.rows())
    groups = tuple(str(row["fields"].get(group_by, NO_GROUP)) if group_by else name for row in rows)
    questions = [question for index, row in enumerate(rows) if (question := _question(index, row)) is not None]
    return HeldOut(name, documents, groups, choose(questions, groups, num_questions))


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


def _question(index: int, row: Mapping[str, Any]) -> Question | None:
    messages = row.get("messages") or ()
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        return None
    content = json.dumps(messages[: last + 1], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    return Question(index, tuple(messages[:last]), messages[last]["content"], key)
