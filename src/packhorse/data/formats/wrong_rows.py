"""Refuse rows that the objective does not take, with what to type instead."""

from __future__ import annotations

from pathlib import Path
from typing import Final, get_args

from packhorse.errors import Mistake
from packhorse.recipe.objectives import Objective, PairedObjective, RowFormat, RowKind, row_kind

HAVE: Final[dict[RowKind, str]] = {
    "answers": "answers to imitate",
    "pairs": "preference pairs",
    "verdicts": "answers with a verdict",
}
WHY: Final[dict[RowKind, str]] = {
    "answers": "it imitates every answer, also the bad ones.",
    "pairs": "it compares a chosen and a rejected answer to the same prompt.",
    "verdicts": "it learns from single answers and whether each is good.",
}


def wrong_rows(name: str, row_format: RowFormat, objective: Objective) -> Mistake:
    """Return the mistake of a source whose rows the objective does not take.

    Args:
        name: Name of the source in messages.
        row_format: Format of its rows.
        objective: Objective of the recipe.
    """
    has, takes = row_kind(row_format), objective.takes
    return Mistake(
        f"{name} has {HAVE[has]} (format {row_format}), and objective is {objective.kind}, which takes {HAVE[takes]}.",
        WHY[takes],
        _fix(name, has, takes),
    )


def _fix(name: str, has: RowKind, takes: RowKind) -> str:
    if has == "answers":
        keys = "chosen and rejected" if takes == "pairs" else "a boolean label"
        return f"name a source whose rows have {keys}, or set objective to sft."
    kinds = [kind for kind, rows in _objectives().items() if rows == has]
    instead = f"set objective to {' or '.join(kinds)}"
    if has == "verdicts" and takes == "pairs":
        return f"{instead}, or name a source whose rows have chosen and rejected."
    form = "chosen" if takes == "answers" else "kto"
    return f"{instead}, or convert the rows: packhorse convert {name} {Path(name).stem}.{form}.jsonl --to {form}."


def _objectives() -> dict[str, RowKind]:
    sections = [section for section in get_args(get_args(Objective)[0]) if issubclass(section, PairedObjective)]
    return {section.model_fields["kind"].default: section.takes for section in sections}
