"""Rows through the formats as a source's rows go."""

from __future__ import annotations

from typing import Any

from packhorse.data.formats.example import Example
from packhorse.data.formats.key_counts import KeyCounts
from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.read.row import Row, RowMistakes
from packhorse.recipe.schema import Source

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "fine"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "fine"}


def convert(values: dict[str, Any], declared: Any = "auto", **source: Any) -> Example:
    """The example of one row; raises the row's mistake."""
    row = Row("rows.jsonl:7", values)
    mistakes = RowMistakes("rows.jsonl")
    given = Source.model_validate({"path": "rows.jsonl", "format": declared, **source})
    examples = list(convert_rows([row], resolve_format(declared, row, given), mistakes, given))
    mistakes.raise_if_any()
    return examples[0]


def count_keys(source: dict[str, Any], *rows: dict[str, Any]) -> KeyCounts:
    """Keys of rows, of which none may be refused."""
    given = Source.model_validate({"path": "rows.jsonl", **source})
    counts, mistakes = KeyCounts(), RowMistakes("rows.jsonl")
    numbered = [Row(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]
    list(convert_rows(numbered, resolve_format(given.format, numbered, given), mistakes, given, counts))
    mistakes.raise_if_any()
    return counts


def turns(messages: Any) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.content, turn.trained) for turn in messages or ()]


def said(messages: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in messages or ()]
