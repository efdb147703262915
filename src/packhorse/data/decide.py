"""What becomes of each row, once all have been seen: left out and why, or its side of the split.

Shapes: R rows, in the order of the spool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.contradictions import contradictions
from packhorse.data.checks.duplicates import equal_groups, near_groups
from packhorse.data.gather import Gathered
from packhorse.data.ledger import LOSSES, SIDES
from packhorse.data.source_pass import Use
from packhorse.data.split.draw import draw
from packhorse.data.split.shares import resolve_shares
from packhorse.data.split.split import assign, replayed, too_small
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe, RetainSource

Int8 = NDArray[np.int8]
Int64 = NDArray[np.int64]
Shares = tuple[float, float, float]

KEPT: Final = -1
REASONS: Final = tuple(LOSSES)
TRAIN, VALIDATION, TEST, RETAIN = range(len(SIDES))
NO_SIDE: Final = -1
USES: Final[tuple[Use, ...]] = ("train", "validation", "retain")


@dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of each row.

    Attributes:
        sides: int8 [R], index into `SIDES`; -1 for a row that is left out.
        losses: int8 [R], index into `REASONS`; -1 for a row that is kept.
        equal: int64 [R], rows of one label say the same; a label is the index of a row.
        alike: int64 [R], rows of one label say the same or nearly.
        contradicting: bool [R], whether the row's prompt has another answer elsewhere; none where it was not asked for.
        shares: Of train, validation and test.
        shares_reason: Why they are what they are.
        findings: Rows by what was seen, whatever became of them.
        notes: What a person should know, in sentences.
    """

    sides: Int8
    losses: Int8
    equal: Int64
    alike: Int64
    contradicting: NDArray[np.bool_]
    shares: Shares
    shares_reason: str
    findings: dict[str, int]
    notes: tuple[str, ...]


def decide(gathered: Gathered, recipe: Recipe) -> Decision:
    """Decide over all rows; lengths are decided later, so that another T never moves a row to another side.

    Raises:
        UserError: Fewer rows than asked for, rows of validation among those of training, or a side without a row.
    """
    pending = _Pending(gathered, recipe)
    for use in USES:
        pending.group(use)
    pending.draw_rows()
    pending.drop_duplicates()
    pending.drop_contaminated()
    pending.share_out()
    return pending.decision()


class _Pending:
    """The columns while they are decided."""

    def __init__(self, gathered: Gathered, recipe: Recipe) -> None:
        self._gathered, self._recipe = gathered, recipe
        self._columns = gathered.spool.columns
        num_rows = len(self._columns)
        self._losses = np.full(num_rows, KEPT, np.int8)
        self._sides = np.full(num_rows, NO_SIDE, np.int8)
        self._equal = np.arange(num_rows)
        self._alike = np.arange(num_rows)
        self._groups = np.arange(num_rows)
        self._notes: list[str] = []
        self._shares: Shares = (1.0, 0.0, 0.0)
        self._shares_reason = ""
        uses = np.array([found.use for found in gathered.sources])
        # Sources stand in the order of their uses, so the rows of a use are one stretch.
        self._stretches = {use: _stretch(np.isin(self._columns.source, np.flatnonzero(uses == use))) for use in USES}

    def group(self, use: Use) -> None:
        """Find rows that say the same: each use for itself, so that a run that retains rows shares them out alike."""
        here = self._stretches[use]
        if here.start == here.stop:
            return
        duplicates, columns = self._recipe.data.duplicates, self._columns
        keys = columns.keys[here]
        equal = alike = equal_groups(keys)
        if duplicates.near != "ignore":
            near = near_groups(self._gathered.spool.signatures("rows")[here], keys, duplicates.threshold)
            alike = near.labels
            frames = zip(near.frames, near.frame_rows)
            self._notes += [_frame_note(num_rows, self._where(first + here.start)) for num_rows, first in frames]
        together = alike
        if self._recipe.data.split.group_by is not None:
            _, first, same = np.unique(columns.conversation[here], return_index=True, return_inverse=True)
            together = joined(alike, first[same])
        self._equal[here], self._alike[here], self._groups[here] = (
            labels + here.start for labels in (equal, alike, together)
        )

    def draw_rows(self) -> None:
        """Leave out what `rows` and `weight` do not ask for."""
        sources = [found.source for found in self._gathered.sources]
        if any(source.rows is not None or source.weight is not None for source in sources):
            drawn = draw(self._columns.keys, self._columns.source, sources, self._recipe.data.split.seed)
            self._lose(~drawn, "not_drawn")

    def drop_duplicates(self) -> None:
        """Of rows that say the same keep one, where the recipe asks for it; refuse any on both sides of a split."""
        duplicates = self._recipe.data.duplicates
        if duplicates.exact == "drop":
            self._lose(self._copies(self._equal), "duplicate")
        if duplicates.near == "drop":
            for use in USES:
                self._lose(self._near_copies(use), "duplicate")
        here, there = self._stretches["train"], self._stretches["validation"]
        leaked = np.zeros(len(self._columns), np.bool_)
        leaked[here] = _found_in(self._columns.keys[here], self._columns.keys[there])
        leaked &= self._losses == KEPT
        if not leaked.any():
            return
        if duplicates.exact == "keep":
            raise _leak(int(np.count_nonzero(leaked)), self._where(int(np.argmax(leaked))))
        self._lose(leaked, "duplicate")

    def drop_contaminated(self) -> None:
        """Leave out what an evaluation asks, where the recipe asks for it."""
        asked = self._recipe.data.decontaminate
        if asked is not None and asked.action == "drop":
            self._lose(self._columns.contaminated, "contaminated")

    def share_out(self) -> None:
        """Give each row that is left its side."""
        split = self._recipe.data.split
        declared = self._recipe.data.validation
        for use in USES:
            rows = self._left(use)
            if len(rows) == 0 and use != "train":
                continue
            if use != "retain" and declared:
                self._sides[rows] = TRAIN if use == "train" else VALIDATION
                continue
            shares, reason = resolve_shares(split, len(rows))
            columns = self._columns
            sides = assign(columns.keys[rows], self._groups[rows], columns.stratum[rows], shares, split.seed)
            _check_sides(sides, use, shares)
            if use == "train":
                self._shares, self._shares_reason = shares, reason
                self._notes += too_small(self._gathered.strata, columns.stratum[rows], sides, shares)
                self._sides[rows] = sides
            else:
                self._share_out_retained(rows, sides)
        if declared:
            self._shares_reason = "data.validation is given, so every row of data.sources is trained on"

    def decision(self) -> Decision:
        """Return the whole."""
        columns = self._columns
        opposed = np.zeros(len(columns), np.bool_)
        if len(columns.prompt_keys):
            opposed = contradictions(columns.prompt_keys, columns.answer_keys)
        copies, alike = (len(labels) - len(np.unique(labels)) for labels in (self._equal, self._alike))
        findings = {
            "exact_duplicates": copies,
            "near_duplicates": alike - copies,
            "contaminated": int(np.count_nonzero(columns.contaminated)),
        }
        return Decision(
            sides=self._sides,
            losses=self._losses,
            equal=self._equal,
            alike=self._alike,
            contradicting=opposed,
            shares=self._shares,
            shares_reason=self._shares_reason,
            findings=findings,
            notes=tuple(self._notes),
        )

    def _near_copies(self, use: Use) -> NDArray[np.bool_]:
        """Rows whose answer is nearly that of another too: two answers to one long question are no copies."""
        here, spool = self._stretches[use], self._gathered.spool
        labels = np.arange(len(self._columns))
        if here.start < here.stop:
            rows, answers = spool.signatures("rows")[here], spool.signatures("answers")[here]
            threshold = self._recipe.data.duplicates.threshold
            labels[here] = near_groups(rows, self._columns.keys[here], threshold, answers).labels + here.start
        return self._copies(labels)

    def _left(self, use: Use) -> Int64:
        here = self._stretches[use]
        return np.asarray(np.flatnonzero(self._losses[here] == KEPT) + here.start)

    def _lose(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Leave rows out that are not left out yet: a row is counted where it is first lost."""
        self._losses[rows & (self._losses == KEPT)] = REASONS.index(reason)

    def _copies(self, labels: Int64) -> NDArray[np.bool_]:
        """Of the rows of a label that are left, all but the one of the smallest key, whatever the order of the file."""
        left = np.flatnonzero(self._losses == KEPT)
        keys = self._columns.keys[left]
        order = np.lexsort((keys[:, 1], keys[:, 0], labels[left]))
        ordered = labels[left][order]
        copies = np.zeros(len(labels), np.bool_)
        copies[left[order[1:]]] = ordered[1:] == ordered[:-1]
        return copies

    def _share_out_retained(self, rows: Int64, sides: Int8) -> None:
        """Old skills: what was held out is evaluated, and of what was trained on, `replay_rows` are trained on again.

        A run that trained on these very sources with the same split has seen none of what is evaluated here.
        """
        self._sides[rows[sides == VALIDATION]] = RETAIN
        of_source = self._columns.source[rows]
        for number, found in enumerate(self._gathered.sources):
            if not isinstance(found.source, RetainSource):
                continue
            trained = rows[(sides == TRAIN) & (of_source == number)]
            again = replayed(self._columns.keys[trained], found.source.replay_rows, self._recipe.data.split.seed)
            if again is None:
                raise UserError(
                    f"data.retain asks for {found.source.replay_rows} replay_rows of {found.name}, whose train share "
                    f"has {len(trained)} rows.",
                    "only rows of the train share are trained on again; the others are held out.",
                    f"set replay_rows to {len(trained)} or less.",
                )
            self._sides[trained[again]] = TRAIN
        self._lose(_at(rows, len(self._sides)) & (self._sides == NO_SIDE), "retain_unused")

    def _where(self, row: int) -> str:
        return str(next(self._gathered.spool.texts([row]))["where"])


def joined(first: Int64, second: Int64) -> Int64:
    """Return labels under which rows stand together that do so in either; a label is the lowest index of its rows."""
    labels = np.minimum(first, second)
    while True:
        lower = labels
        for groups in (first, second):
            lowest = np.full(len(groups), len(groups))
            np.minimum.at(lowest, groups, lower)
            lower = lowest[groups]
        # A label is a row: taking that row's label too halves the length of a chain.
        lower = lower[lower]
        if np.array_equal(lower, labels):
            return labels
        labels = lower


def _stretch(rows: NDArray[np.bool_]) -> slice:
    there = np.flatnonzero(rows)
    return slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)


def _at(rows: Int64, num_rows: int) -> NDArray[np.bool_]:
    marked = np.zeros(num_rows, np.bool_)
    marked[rows] = True
    return marked


def _found_in(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return bool [R]: the keys that stand among the others, both halves equal."""
    pair = np.dtype([("high", np.uint64), ("low", np.uint64)])
    one, two = (np.ascontiguousarray(side).view(pair).ravel() for side in (keys, others))
    return np.isin(one, two)


def _frame_note(num_rows: int, where: str) -> str:
    return (
        f"{num_rows:,} rows are alike, the first of them {where}: taken for one frame filled in differently, not for "
        "copies, so they are not kept on one side of the split"
    )


def _leak(num_rows: int, where: str) -> UserError:
    return UserError(
        f"{num_rows} rows of data.sources are rows of data.validation too; the first is {where}.",
        "what was trained on cannot show what was learnt.",
        "set data.duplicates.exact to drop, which leaves them out of training, or take them out of one file.",
    )


def _check_sides(sides: Int8, use: Use, shares: Shares) -> None:
    what = "data.retain" if use == "retain" else "data.sources"
    named = zip(("train", "validation"), shares)
    for side, (name, share) in enumerate(named):
        if share > 0 and (use == "train" or name == "validation") and not np.any(sides == side):
            raise UserError(
                f"{what} has {len(sides)} rows, and data.split.{name} of {share:g} gives 0 of them.",
                "rows that say the same share a side, and a share of no rows can be neither trained on nor measured.",
                f"add rows, raise data.split.{name}, or name rows of their own in data.validation.",
            )
