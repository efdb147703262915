"""Rows of a comparison, and which of them are answered."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from packhorse.data.checks.duplicates import near_groups
from packhorse.data.checks.keys import content_keys
from packhorse.data.checks.texts import row_text
from packhorse.data.checks.words import signatures
from packhorse.data.formats.example import Example
from packhorse.data.formats.example import Message as Turn
from packhorse.data.packs.store import PackStore, open_store
from packhorse.data.render.control_tokens import ControlTokens
from packhorse.data.render.turns import template_tools, template_turns
from packhorse.errors import UserError
from packhorse.evaluate.generate import Message, Tools
from packhorse.evaluate.preference import documents_and_rejected
from packhorse.evaluate.score import Documents
from packhorse.evaluate.statistics.sample_size import rows_for_shares
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.recipe.schema import DataSection, TrainOnSection

Form = Callable[[Mapping[str, Any]], tuple[list[Message], Tools]]
"""Function from a stored row to its turns and tools, as the template takes them."""
NO_GROUP: Final = "(none)"
SETS: Final = ("validation", "retain")
NEAR_COPY: Final = 0.8
"""Share of common shingles from which two held-out rows count as near copies."""


@dataclass(frozen=True)
class Question:
    """A row that can be answered: the chat up to its last assistant turn, with the true history.

    Attributes:
        row: Index of the document.
        prompt: Messages before the answer.
        answer: Expected turn.
        key: Hash of the content, which decides the order in which rows are chosen.
        tools: Tools that the assistant may call.
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
        documents: Tokens of the rows; of preference pairs, those of the chosen answers.
        rows: Row of each document, from 0; a text longer than a pack may be several documents.
        groups: Group of each document.
        clusters: Cluster of each document: documents of one row, near copies, and rows with one value of
            `evaluation.cluster_by` are not independent of each other.
        questions: Rows to answer.
        rejected: Tokens of the rejected answers of preference pairs.
    """

    name: str
    documents: Documents
    rows: tuple[int, ...]
    groups: tuple[str, ...]
    clusters: tuple[int, ...]
    questions: tuple[Question, ...]
    rejected: Documents | None = None


def read_sets(data_folder: Path, settings: EvaluationSection, form: Form) -> list[HeldOut]:
    """Return the validation rows and, if there are any, the retain rows; never the test rows.

    Args:
        data_folder: Folder of the prepared data.
        settings: Section of the recipe: grouping, and the number of rows to answer.
        form: Form in which rows were trained.

    Raises:
        UserError: There are no held-out rows.
    """
    candidates = [read_held_out(data_folder, name, settings, form) for name in SETS]
    sets = [held_out for held_out in candidates if held_out is not None]
    if not sets:
        raise UserError(
            f"{data_folder} has 0 validation rows and 0 retain rows.",
            "a model is evaluated on rows that it was not trained on.",
            "raise data.split.validation, or name rows in data.validation, and train again.",
        )
    return sets


def read_held_out(data_folder: Path, name: str, settings: EvaluationSection, form: Form) -> HeldOut | None:
    """Return a set of prepared data; None if it has no rows.

    Args:
        data_folder: Folder of the prepared data.
        name: Name of the set, validation or retain.
        settings: Section of the recipe: grouping, and the number of rows to answer.
        form: Form in which rows were trained.

    Raises:
        ValueError: The name is another one; only `data.seal` opens the test rows.
    """
    if name not in SETS:
        raise ValueError(f"{name} is not one of {', '.join(SETS)}")
    if not (data_folder / name).is_dir():
        return None
    documents = open_store(data_folder, name)
    return None if documents.num_documents == 0 else held_out_of(documents, name, settings, form)


def held_out_of(store: PackStore, name: str, settings: EvaluationSection, form: Form) -> HeldOut:
    """Reads the rows of an open store.

    Args:
        store: One document or more, with their rows.
        name: Name of the set.
        settings: Section of the recipe: grouping, and the number of rows to answer.
        form: Form in which rows were trained.
    """
    group_by = settings.group_by
    documents, rejected = documents_and_rejected(store)
    stored = list(store.rows())
    assert len(stored) == documents.num_documents, f"{len(stored)} rows for {documents.num_documents} documents"
    groups = tuple(str(row["fields"].get(group_by, NO_GROUP)) if group_by else name for row in stored)
    questions = [question for index, row in enumerate(stored) if (question := _question(index, row)) is not None]
    chosen = choose(questions, groups, num_answered(settings))
    questions_as_trained = tuple(_as_trained(question, stored[question.row], form) for question in chosen)
    rows = _rows_of(stored)
    clusters = _clusters(stored, rows, settings.cluster_by)
    return HeldOut(name, documents, rows, groups, clusters, questions_as_trained, rejected)


def choose(questions: Sequence[Question], groups: Sequence[str], limit: int) -> tuple[Question, ...]:
    """Return rows from every group in turn, ordered by a hash of their content and not by their order in the file.

    Args:
        questions: Rows that can be answered.
        groups: Group of each row of the set.
        limit: Largest number of rows.
    """
    waiting: defaultdict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: question.key):
        waiting[groups[question.row]].append(question)
    turns = [(turn, group) for group, questions in waiting.items() for turn in range(len(questions))]
    return tuple(waiting[group][turn] for turn, group in sorted(turns)[:limit])


def num_answered(settings: EvaluationSection) -> int:
    """Return how many rows of a set are answered: those that the smallest effect needs, within the budget."""
    return min(settings.max_answered_rows, rows_for_shares(settings.smallest_effect))


def _clusters(stored: Sequence[Mapping[str, Any]], rows: Sequence[int], cluster_by: str | None) -> tuple[int, ...]:
    if cluster_by:
        numbers: dict[str, int] = {}
        # A row without the field is a cluster alone.
        names = (str(row["fields"].get(cluster_by, f"row {number}")) for number, row in zip(rows, stored))
        return tuple(numbers.setdefault(name, len(numbers)) for name in names)
    examples = [_example(row) for row in stored]
    texts = signatures([row_text(example) for example in examples])
    near = near_groups(texts, content_keys(examples), NEAR_COPY).labels
    first = {row: document for document, row in reversed(list(enumerate(rows)))}
    return tuple(int(near[first[row]]) for row in rows)


def _rows_of(stored: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the row of each document. Only plain text becomes several documents, which follow each other."""
    rows = [0]
    for before, row in pairwise(stored):
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


def trained_form(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> Form:
    """Return the function from a stored row to the turns and tools that training rendered.

    The form includes the thinking and the control tokens that `data.train_on` and `data.control_tokens` allow.

    Args:
        tokenizer: Tokenizer whose special tokens are the control tokens.
        data: Section of the recipe.
    """
    return partial(_formed, train_on=data.train_on, control=ControlTokens(tokenizer, data.control_tokens))


def _formed(row: Mapping[str, Any], train_on: TrainOnSection, control: ControlTokens) -> tuple[list[Message], Tools]:
    example = _example(row)
    return template_turns(example, train_on, control), template_tools(example, control) or ()


def _example(row: Mapping[str, Any]) -> Example:
    messages = row.get("messages")
    return Example(
        messages=tuple(_turn(message) for message in messages) if messages else None,
        text=row.get("text"),
        fields={},
        where=row["where"],
        tools=tuple(row.get("tools") or ()),
    )


def _turn(message: Mapping[str, Any]) -> Turn:
    return Turn(
        role=message["role"],
        content=message["content"],
        thinking=message.get("reasoning_content"),
        tool_calls=tuple(message.get("tool_calls") or ()),
        name=message.get("name"),
        call_id=message.get("tool_call_id"),
    )
