"""Compare the splits that are given as separate sources, and report the rows that are in several of them."""

from __future__ import annotations

from typing import Final

import numpy as np

from packhorse.data.checks.duplicates import Labels, equal_groups, near_groups
from packhorse.data.checks.leaks import GIVEN_SPLITS, Leaks, Ranks, find_leaks
from packhorse.data.gather.source_pass import SourceUse
from packhorse.data.gather.spool import Spool
from packhorse.errors import Mistake
from packhorse.recipe.schema import DataSection

SHOWN_LEAKS: Final = 3


def leaks_of(spool: Spool, data: DataSection, ranks: Ranks) -> Leaks:
    """Return the rows of given splits that are also in a split of higher rank.

    Args:
        spool: All rows; those of the given splits come first.
        data: Threshold of near duplicates and `split.group_by`.
        ranks: int8 [rows of the given splits], index into `GIVEN_SPLITS`; -1 for a row that does not count.
    """
    columns, here = spool.columns, slice(0, len(ranks))
    near = groups = None
    if data.duplicates.near != "ignore":
        near = near_groups(spool.signatures("rows")[here], columns.keys[here], data.duplicates.threshold).labels
    if data.split.group_by is not None:
        groups = equal_groups(np.stack([columns.conversation[here]] * 2, axis=1))
    prompts, answers = columns.normalised_prompt_keys[here], columns.normalised_answer_keys[here]
    return find_leaks(ranks, columns.keys[here], prompts, answers, near, groups)


def leak_mistakes(spool: Spool, leaks: Leaks, ranks: Ranks) -> list[Mistake]:
    """Return one mistake for each two splits that share rows."""
    return [_mistake(spool, leaks, *pair) for pair in leaks.between(ranks)]


def section_of(use: SourceUse) -> str:
    """Return the key of the recipe that names the sources of a use."""
    return "data.sources" if use == "train" else f"data.{use}"


def _mistake(spool: Spool, leaks: Leaks, rank: int, into: int, rows: Labels) -> Mistake:
    name, other = section_of(GIVEN_SPLITS[rank]), section_of(GIVEN_SPLITS[into])
    pairs = [(row, int(leaks.matches[row])) for row in rows[:SHOWN_LEAKS].tolist()]
    shown = ", ".join(f"{_where(spool, row)} ({_where(spool, match)})" for row, match in pairs)
    be = "row of {} is" if len(rows) == 1 else "rows of {} are"
    return Mistake(
        f"{len(rows):,} {be.format(name)} also in {other}: {leaks.counts(rows)}; the first: {shown}.",
        "rows that were trained on, or used to choose between runs, cannot measure what the model learned.",
        f"set data.duplicates.leaks to drop, which removes them from {name}, or to keep, which counts them.",
    )


def _where(spool: Spool, row: int) -> str:
    return str(next(spool.texts([row]))["where"])
