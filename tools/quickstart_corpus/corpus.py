"""The quickstart's bilingual instruction corpus: the same rows on every machine, with no download."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from quickstart_corpus.families import (
    draw_dates,
    draw_extraction,
    draw_greeting,
    draw_sorting,
    draw_units,
)
from quickstart_corpus.phrases import draw_capitals, draw_plural, draw_refusal, draw_sentiment
from quickstart_corpus.rows import LANGUAGES, Dice, Draw, Language, Task
from quickstart_corpus.tickets import draw_inbox, draw_ticket

# Rows per language. Copying and counting take a small model longer than choosing a phrase does.
CORE_FAMILIES: Final[tuple[tuple[str, Draw, int], ...]] = (
    ("units", draw_units, 500),
    ("dates", draw_dates, 500),
    ("sorting", draw_sorting, 600),
    ("greeting", draw_greeting, 300),
    ("extraction", draw_extraction, 600),
    ("sentiment", draw_sentiment, 200),
    ("plural", draw_plural, 300),
    ("refusal", draw_refusal, 200),
    ("capitals", draw_capitals, 150),
    ("inbox", draw_inbox, 300),
)
TICKET_FAMILIES: Final[tuple[tuple[str, Draw, int], ...]] = (("tickets", draw_ticket, 800),)
DRAWS_PER_TASK: Final = 20
CORE_SEED: Final = 20_240_501
TICKETS_SEED: Final = 20_240_502


@dataclass(frozen=True)
class Row:
    """One row of the corpus: a task, its language and its family."""

    task: Task
    language: Language
    family: str

    def messages(self) -> list[dict[str, str]]:
        """Return the turns: the system's if there is one, the user's and the assistant's."""
        turns = [("system", self.task.system)] if self.task.system else []
        turns += [("user", self.task.prompt), ("assistant", self.task.answer)]
        return [{"role": role, "content": content} for role, content in turns]

    def as_messages(self) -> dict[str, object]:
        """Return the row as a chat."""
        return {"messages": self.messages(), "language": self.language, "family": self.family}

    def as_alpaca(self) -> dict[str, object]:
        """Return the row in Alpaca's columns, which have no place for a system turn."""
        return {
            "instruction": self.task.instruction,
            "input": self.task.text,
            "output": self.task.answer,
            "language": self.language,
            "family": self.family,
        }


def core_rows() -> list[Row]:
    """Return the rows that a fresh model is trained on."""
    return draw_corpus(CORE_FAMILIES, Dice(CORE_SEED))


def ticket_rows() -> list[Row]:
    """Return the rows of the family that the core corpus leaves out."""
    return draw_corpus(TICKET_FAMILIES, Dice(TICKETS_SEED))


def draw_corpus(families: Iterable[tuple[str, Draw, int]], dice: Dice) -> list[Row]:
    """Draw each family's rows in both languages, in a drawn order."""
    rows = [
        Row(task, language, family)
        for family, draw, num_rows in families
        for language in LANGUAGES
        for task in draw_tasks(draw, language, num_rows, dice)
    ]
    return dice.shuffled(rows)


def draw_tasks(draw: Draw, language: Language, num_tasks: int, dice: Dice) -> list[Task]:
    """Draw tasks with different prompts, so that a held-out row was never seen in training."""
    tasks: dict[str, Task] = {}
    for _ in range(DRAWS_PER_TASK * num_tasks):
        if len(tasks) == num_tasks:
            break
        task = draw(language, dice)
        tasks.setdefault(task.prompt, task)
    assert len(tasks) == num_tasks, f"{draw.__name__} has too few different prompts"
    return list(tasks.values())


def to_jsonl(rows: Iterable[Mapping[str, object]]) -> str:
    """Return the rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
