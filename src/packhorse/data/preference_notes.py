"""What preference data has besides quality: longer chosen answers, many more good than bad answers."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.gather.spool import Columns
from packhorse.recipe.objectives import KtoObjective, Objective

LENGTH_RATIO: Final = 1.5
BALANCE: Final = (1.0, 4 / 3)
"""Range of (weight x number of good answers) / (weight x number of bad ones) that KTO's authors recommend."""


def preference_notes(columns: Columns, rows: NDArray[np.int64], objective: Objective) -> list[str]:
    """Return sentences about the rows to train on that the user should read.

    Args:
        columns: Facts about all rows.
        rows: Indices of the rows to train on.
        objective: Objective of the recipe.
    """
    if objective.takes == "pairs":
        chosen = columns.cut_labels[rows]
        return _length_notes(float(chosen.mean()), float((columns.labels[rows] - chosen).mean()))
    if isinstance(objective, KtoObjective):
        num_good = int(columns.verdicts[rows].sum())
        return _balance_notes(num_good, len(rows) - num_good, objective)
    return []


def _length_notes(chosen: float, rejected: float) -> list[str]:
    ratio = max(chosen, rejected) / min(chosen, rejected)
    if ratio <= LENGTH_RATIO:
        return []
    more = "times as many" if chosen > rejected else "times fewer"
    return [
        f"the chosen answers have {chosen:,.0f} supervised tokens on average, the rejected ones {rejected:,.0f}: "
        f"{ratio:.1f} {more}; a model can learn the length instead of the quality: objective simpo compares per token"
    ]


def _balance_notes(num_good: int, num_bad: int, objective: KtoObjective) -> list[str]:
    if 0 in (num_good, num_bad):
        return [f"all {num_good + num_bad:,} answers are {'good' if num_good else 'bad'}; kto needs both"]
    low, high = BALANCE
    good, bad = objective.desirable_weight * num_good, objective.undesirable_weight * num_bad
    if low * bad <= good * 1.005 and good <= high * bad * 1.005:
        return []
    field = "desirable_weight" if good < bad else "undesirable_weight"
    weight = bad / num_good if good < bad else good / high / num_bad
    return [
        f"{num_good:,} good and {num_bad:,} bad answers have the total weights {good:,.3g} and {bad:,.3g}; the authors "
        f"of KTO recommend a ratio of 1 to 4/3: set objective.{field} to {weight:.3g}"
    ]
