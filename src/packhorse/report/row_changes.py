"""Rows that the tuned model answers better or worse than its base, from RUN/evaluation/rows.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from pyarrow import parquet
from pydantic import BaseModel, ConfigDict

from packhorse.report.readable import clipped

MOST_ROWS: Final = 20
LONGEST_TEXT_CHARACTERS: Final = 1_500
TEXTS: Final = ("key", "prompt", "expected", "base/answer", "tuned/answer")


class RowChange(BaseModel):
    """One row and the answers of both models; long texts are cut."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", use_attribute_docstrings=True)

    key: str
    """Hash of the row's content."""
    prompt: str
    expected: str
    base: str
    tuned: str
    base_value: float
    tuned_value: float


class RowChanges(BaseModel):
    """Wins and losses of the tuned model by one metric on one set, the largest differences first."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    set: str
    metric: str
    unit: str
    num_wins: int
    num_losses: int
    wins: tuple[RowChange, ...]
    """At most 20 rows."""
    losses: tuple[RowChange, ...]


def read_row_changes(file: Path, name: str, metric: str, unit: str, higher_is_better: bool) -> RowChanges:
    """Return wins and losses on one set.

    Args:
        file: Values and answers by row.
        name: Name of the set.
        metric: Metric of answers; its columns are `base/METRIC` and `tuned/METRIC`.
        unit: Unit of the metric.
        higher_is_better: Whether a higher value is a win.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no Parquet file, or lacks a column.
        KeyError: It lacks a column.
    """
    table = parquet.read_table(file, columns=["set", f"base/{metric}", f"tuned/{metric}"])
    base, tuned = (table[f"{side}/{metric}"].to_numpy().astype(np.float64) for side in ("base", "tuned"))
    gain = np.where(table["set"].to_numpy() == name, (tuned - base) * (1 if higher_is_better else -1), np.nan)
    # A stable sort keeps the order of the file among equal differences.
    order = np.argsort(-np.abs(gain), kind="stable")
    wins, losses = (order[gain[order] > 0], order[gain[order] < 0])
    chosen = np.concatenate([wins[:MOST_ROWS], losses[:MOST_ROWS]])
    texts = parquet.read_table(file, columns=list(TEXTS)).take(chosen).to_pylist() if len(chosen) else []
    changes = [
        RowChange(
            **dict(zip(("key", "prompt", "expected", "base", "tuned"), map(_text, map(row.get, TEXTS)), strict=True)),
            base_value=float(base[at]),
            tuned_value=float(tuned[at]),
        )
        for row, at in zip(texts, chosen, strict=True)
    ]
    num_shown_wins = len(wins[:MOST_ROWS])
    return RowChanges(
        set=name,
        metric=metric,
        unit=unit,
        num_wins=len(wins),
        num_losses=len(losses),
        wins=tuple(changes[:num_shown_wins]),
        losses=tuple(changes[num_shown_wins:]),
    )


def _text(value: object) -> str:
    return "" if value is None else clipped(str(value), LONGEST_TEXT_CHARACTERS)
