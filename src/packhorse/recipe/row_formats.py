"""Formats of rows, and what their rows have: answers to imitate, pairs of answers, or answers with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

RowFormat = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text_label",
    "text",
    "preference",
    "kto",
    "ranked",
    "rated",
    "tree",
]
RowKind = Literal["answers", "pairs", "verdicts"]
"""Rows with answers to imitate, with a chosen and a rejected answer, or with one answer and whether it is good."""
KIND_OF: Final[Mapping[RowFormat, RowKind]] = {
    "preference": "pairs",
    "ranked": "pairs",
    "kto": "verdicts",
    "rated": "verdicts",
}


def row_kind(row_format: RowFormat) -> RowKind:
    """Return what the rows of a format have."""
    return KIND_OF.get(row_format, "answers")
