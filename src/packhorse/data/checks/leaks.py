"""Find rows that are also in a held-out split, where the splits are given as separate sources.

A row leaks into the held-out split of the highest rank that has its match, and counts under its first kind. Matches are
groups: as in a drawn split, rows that are connected by a chain of near duplicates belong together.

Shapes: R rows, in the order of the sources: train, validation, test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.duplicates import Labels, equal_groups, largest_group
from packhorse.data.checks.keys import NO_PROMPT, Keys

Ranks = NDArray[np.int8]

GIVEN_SPLITS: Final[tuple[Literal["train", "validation", "test"], ...]] = ("train", "validation", "test")
NOT_COUNTED: Final = -1
KINDS: Final = (
    "equal",
    "with the same prompt and answer",
    "with the same prompt and another answer",
    "nearly equal",
    "with the same value of data.split.group_by",
)
_FOLD: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Leaks:
    """Rows that are also in a split of higher rank.

    Attributes:
        kinds: int8 [R], index into `KINDS`; -1 for a row that does not leak.
        into: int8 [R], rank of the split that the row leaks into.
        matches: int64 [R], first row of that split that matches.
    """

    kinds: NDArray[np.int8]
    into: Ranks
    matches: Labels

    @property
    def rows(self) -> NDArray[np.bool_]:
        """bool [R], the rows that leak."""
        return np.asarray(self.kinds >= 0)

    def between(self, ranks: Ranks) -> Iterator[tuple[int, int, Labels]]:
        """Yield the rank of a split, the rank of the split that its rows leak into, and these rows, rising."""
        for rank in range(len(GIVEN_SPLITS)):
            for into in range(rank + 1, len(GIVEN_SPLITS)):
                rows = np.flatnonzero(self.rows & (ranks == rank) & (self.into == into))
                if len(rows):
                    yield rank, into, rows

    def counts(self, rows: Labels) -> str:
        """Return the number of rows of each kind, such as `3 equal, 20 nearly equal`."""
        numbers = np.bincount(self.kinds[rows], minlength=len(KINDS)).tolist()
        return ", ".join(f"{number:,} {kind}" for number, kind in zip(numbers, KINDS) if number)


def find_leaks(
    ranks: Ranks, keys: Keys, prompts: Keys, answers: Keys, near: Labels | None, groups: Labels | None
) -> Leaks:
    """Return the rows that are also in a split of higher rank.

    Args:
        ranks: int8 [R], index into `GIVEN_SPLITS`; -1 for a row that does not count.
        keys: uint64 [R, 2] of `content_keys`.
        prompts: uint64 [R, 2] of `normalised_prompt_keys`.
        answers: uint64 [R, 2] of `normalised_answer_keys`.
        near: int64 [R], label shared by nearly equal rows; None: not searched for.
        groups: int64 [R], label shared by rows with one value of `data.split.group_by`; None without it.
    """
    both = equal_groups(prompts * _FOLD + answers)
    has_prompt = (prompts != NO_PROMPT).any(axis=1)
    alone = np.arange(len(keys))
    labels = (
        equal_groups(keys),
        np.where(has_prompt, both, alone),
        np.where(has_prompt, _questions(equal_groups(prompts), both), alone),
        near,
        groups,
    )
    kinds = np.full(len(keys), -1, np.int8)
    into, matches = np.full(len(keys), -1, np.int8), np.full(len(keys), -1)
    for kind, of_kind in enumerate(labels):
        if of_kind is None:
            continue
        highest, first = _highest(of_kind, ranks)
        new = (ranks != NOT_COUNTED) & (highest > ranks) & (kinds < 0)
        kinds[new], into[new], matches[new] = kind, highest[new], first[new]
    return Leaks(kinds, into, matches)


def _questions(prompts: Labels, both: Labels) -> Labels:
    """Return int64 [R], the labels of the prompts; a prompt with too many answers is an instruction, and no group."""
    of_answers = prompts[both == np.arange(len(both))]
    num_answers = np.bincount(of_answers, minlength=len(prompts))
    return np.where((num_answers > largest_group(len(of_answers)))[prompts], np.arange(len(prompts)), prompts)


def _highest(labels: Labels, ranks: Ranks) -> tuple[Ranks, Labels]:
    """Return the highest rank among the rows of each row's label, and the first row of that rank, each [R]."""
    highest = np.full(len(labels), NOT_COUNTED, np.int8)
    np.maximum.at(highest, labels, ranks)
    highest = highest[labels]
    first = np.full(len(labels), len(labels))
    at = np.flatnonzero(ranks == highest)
    np.minimum.at(first, labels[at], at)
    return highest, first[labels]
