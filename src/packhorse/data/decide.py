"""Decide over all rows together: which are dropped and why, and which side of the split each other row gets.

Shapes: R rows, in the order of the spool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.duplicates import equal_groups, near_groups
from packhorse.data.checks.keys import contradictions
from packhorse.data.checks.leaks import GIVEN_SPLITS, NOT_COUNTED
from packhorse.data.gather.gather import GatheredRows
from packhorse.data.gather.source_pass import SourceUse
from packhorse.data.given_splits import leak_mistakes, leaks_of, section_of
from packhorse.data.ledger import LOSSES, SIDES
from packhorse.data.split.draw import draw
from packhorse.data.split.folds import fold_shares, held_out_fold
from packhorse.data.split.shares import Shares, given_splits, resolve_shares
from packhorse.data.split.split import assign, replayed, too_small
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe, RetainSource

Int8 = NDArray[np.int8]
Int64 = NDArray[np.int64]

KEPT: Final = -1
REASONS: Final = tuple(LOSSES)
TRAIN, VALIDATION, TEST, RETAIN = range(len(SIDES))
NO_SIDE: Final = -1
USES: Final[tuple[SourceUse, ...]] = ("train", "validation", "test", "retain")


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision about each row.

    Attributes:
        sides: int8 [R], index into `SIDES`; -1 for a dropped row.
        losses: int8 [R], index into `REASONS`; -1 for a row that is kept.
        equal: int64 [R], label shared by equal rows; a label is the index of a row.
        alike: int64 [R], label shared by equal and nearly equal rows.
        contradicting: bool [R], whether another row has the same prompt and another answer; False without prompt keys.
        leaked: bool [R], whether the row is also in a given split that is held out, `data.validation` or `data.test`.
        shares: Shares of train, validation and test.
        shares_reason: Where the shares come from.
        findings: Name of a finding to its number of rows, kept or dropped.
        notes: Sentences that the user should read.
    """

    sides: Int8
    losses: Int8
    equal: Int64
    alike: Int64
    contradicting: NDArray[np.bool_]
    leaked: NDArray[np.bool_]
    shares: Shares
    shares_reason: str
    findings: dict[str, int]
    notes: tuple[str, ...]


def decide(gathered: GatheredRows, recipe: Recipe) -> Decision:
    """Decide over all rows except for their lengths, so that another T never moves a row to another side.

    Raises:
        UserError: Fewer rows than required, rows in several given splits, or a side without rows.
    """
    pending = _Pending(gathered, recipe)
    for use in USES:
        pending.group(use)
    pending.draw_rows()
    pending.drop_duplicates()
    pending.drop_leaks()
    pending.drop_contaminated()
    pending.share_out()
    return pending.decision()


class _Pending:
    """Columns of the decision while it is made."""

    def __init__(self, gathered: GatheredRows, recipe: Recipe) -> None:
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
        self._given = given_splits(recipe.data)
        self._leaked = np.zeros(num_rows, np.bool_)
        uses = np.array([source.use for source in gathered.sources])
        # Sources are in the order of their uses, so the rows of a use are contiguous.
        self._stretches = {use: _stretch(np.isin(self._columns.source, np.flatnonzero(uses == use))) for use in USES}

    def group(self, use: SourceUse) -> None:
        """Find equal and similar rows, separately for each use: a run with `data.retain` then splits rows equally."""
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
        """Drop the rows that `rows` and `weight` of the sources exclude."""
        sources = [source.declared for source in self._gathered.sources]
        if any(source.rows is not None or source.weight is not None for source in sources):
            drawn = draw(self._columns.keys, self._columns.source, sources, self._recipe.data.split.seed)
            self._lose(~drawn, "not_drawn")

    def drop_duplicates(self) -> None:
        """Keep one of several equal rows if the recipe says so, in each split."""
        duplicates = self._recipe.data.duplicates
        if duplicates.exact == "drop":
            self._lose(self._copies(self._equal), "duplicate")
        if duplicates.near == "drop":
            for use in USES:
                self._lose(self._near_copies(use), "duplicate")

    def drop_leaks(self) -> None:
        """Refuse rows that are also in a given split of held-out rows; or drop or keep them, if the recipe says so."""
        if not self._given:
            return
        duplicates, ranks = self._recipe.data.duplicates, self._ranks()
        leaks = leaks_of(self._gathered.spool, self._recipe.data, ranks)
        self._leaked[: len(ranks)] = leaks.rows
        found = leak_mistakes(self._gathered.spool, leaks, ranks)
        if duplicates.leaks == "raise" and found:
            raise UserError.of(found)
        done = f"they are {'dropped' if duplicates.leaks == 'drop' else 'kept'}, as data.duplicates.leaks says"
        self._notes += [f"{leak.fact.removesuffix('.')}; {done}" for leak in found]
        if duplicates.near == "ignore":
            self._notes.append("near copies in given splits are not searched for, as data.duplicates.near is ignore")
        if duplicates.leaks == "drop":
            self._lose(self._leaked, "leaked")

    def drop_contaminated(self) -> None:
        """Drop rows that contain text of an evaluation, if the recipe says so."""
        decontaminate = self._recipe.data.decontaminate
        if decontaminate is not None and decontaminate.action == "drop":
            self._lose(self._columns.contaminated, "contaminated")

    def share_out(self) -> None:
        """Assign a side to each row that is still kept."""
        split = self._recipe.data.split
        for use in USES:
            rows = self._kept(use)
            if len(rows) == 0:
                self._check_emptied(use)
                continue
            if use in self._given:
                self._sides[rows] = SIDES.index(use)
                continue
            shares, reason = resolve_shares(split, len(rows), self._given if use == "train" else ())
            columns = self._columns
            sides = assign(columns.keys[rows], self._groups[rows], columns.stratum[rows], shares, split.seed)
            _check_sides(sides, use, shares)
            if use == "train":
                if split.fold is not None:
                    together, strata = self._groups[rows], columns.stratum[rows]
                    held_out_fold(columns.keys[rows], together, strata, sides, split.fold, split.seed)
                    shares, reason = fold_shares(shares, split.fold)
                self._shares, self._shares_reason = shares, reason
                self._notes += too_small(self._gathered.strata, columns.stratum[rows], sides, shares)
                self._sides[rows] = sides
            else:
                self._share_out_retained(rows, sides)

    def decision(self) -> Decision:
        """Return the finished decision."""
        columns = self._columns
        opposed = np.zeros(len(columns), np.bool_)
        if len(columns.prompt_keys):
            opposed = contradictions(columns.prompt_keys, columns.answer_keys)
        copies, alike = (len(labels) - len(np.unique(labels)) for labels in (self._equal, self._alike))
        findings = {
            "exact_duplicates": copies,
            "near_duplicates": alike - copies,
            "contaminated": int(np.count_nonzero(columns.contaminated)),
            **({"leaks": int(np.count_nonzero(self._leaked))} if self._given else {}),
        }
        return Decision(
            sides=self._sides,
            losses=self._losses,
            equal=self._equal,
            alike=self._alike,
            contradicting=opposed,
            leaked=self._leaked,
            shares=self._shares,
            shares_reason=self._shares_reason,
            findings=findings,
            notes=tuple(self._notes),
        )

    def _near_copies(self, use: SourceUse) -> NDArray[np.bool_]:
        """Return rows whose answer is similar to another's too: two answers to one long question are not copies."""
        here, spool = self._stretches[use], self._gathered.spool
        labels = np.arange(len(self._columns))
        if here.start < here.stop:
            rows, answers = spool.signatures("rows")[here], spool.signatures("answers")[here]
            threshold = self._recipe.data.duplicates.threshold
            labels[here] = near_groups(rows, self._columns.keys[here], threshold, answers).labels + here.start
        return self._copies(labels)

    def _ranks(self) -> Int8:
        """Return int8 [rows of the given splits], the rank of each row's split; rows that are not kept do not count."""
        here = slice(0, max(self._stretches[split].stop for split in GIVEN_SPLITS))
        ranks = np.zeros(here.stop, np.int8)
        for rank, split in enumerate(GIVEN_SPLITS):
            ranks[self._stretches[split]] = rank
        ranks[self._losses[here] != KEPT] = NOT_COUNTED
        return ranks

    def _check_emptied(self, use: SourceUse) -> None:
        """Raise UserError if a use had rows, and each of them is dropped; `data.retain` may end without rows."""
        here = self._stretches[use]
        if use == "retain" or here.start == here.stop:
            return
        counts = np.bincount(self._losses[here], minlength=len(REASONS))
        most = REASONS[int(np.argmax(counts))]
        setting = "data.decontaminate.action to report" if most == "contaminated" else "data.duplicates.leaks to keep"
        name = section_of(use)
        raise UserError(
            f"no row of {name} is left: {int(counts.max()):,} of {int(counts.sum()):,} are dropped as {most}.",
            f"the ledger counts them as: {LOSSES[most]}.",
            f"give {name} other rows, or set {setting}.",
        )

    def _kept(self, use: SourceUse) -> Int64:
        here = self._stretches[use]
        return np.asarray(np.flatnonzero(self._losses[here] == KEPT) + here.start)

    def _lose(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Drop rows that are not dropped yet, so that each row is counted once, under its first reason."""
        self._losses[rows & (self._losses == KEPT)] = REASONS.index(reason)

    def _copies(self, labels: Int64) -> NDArray[np.bool_]:
        """Return the kept rows of each label except the one with the smallest key, whatever the order of the file."""
        left = np.flatnonzero(self._losses == KEPT)
        keys = self._columns.keys[left]
        order = np.lexsort((keys[:, 1], keys[:, 0], labels[left]))
        ordered = labels[left][order]
        copies = np.zeros(len(labels), np.bool_)
        copies[left[order[1:]]] = ordered[1:] == ordered[:-1]
        return copies

    def _share_out_retained(self, rows: Int64, sides: Int8) -> None:
        """Evaluate the held-out rows of `data.retain`, and train again on `replay_rows` of the others.

        A run that trained on these sources with the same split has not seen the rows that are evaluated.
        """
        self._sides[rows[sides == VALIDATION]] = RETAIN
        of_source = self._columns.source[rows]
        for number, source in enumerate(self._gathered.sources):
            if not isinstance(source.declared, RetainSource):
                continue
            trained = rows[(sides == TRAIN) & (of_source == number)]
            again = replayed(self._columns.keys[trained], source.declared.replay_rows, self._recipe.data.split.seed)
            if again is None:
                raise UserError(
                    f"data.retain has {source.declared.replay_rows} replay_rows for {source.name}, and its train share "
                    f"has {len(trained)} rows.",
                    "only rows of the train share can be trained on again; the others are held out.",
                    f"set replay_rows to {len(trained)} or less.",
                )
            self._sides[trained[again]] = TRAIN
        self._lose(_at(rows, len(self._sides)) & (self._sides == NO_SIDE), "retain_unused")

    def _where(self, row: int) -> str:
        return str(next(self._gathered.spool.texts([row]))["where"])


def joined(first: Int64, second: Int64) -> Int64:
    """Return labels that join the groups of both inputs; a label is the lowest index of its rows."""
    labels = np.minimum(first, second)
    while True:
        lower = labels
        for groups in (first, second):
            lowest = np.full(len(groups), len(groups))
            np.minimum.at(lowest, groups, lower)
            lower = lowest[groups]
        # A label is a row: following that row's own label too halves the length of a chain.
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


def _frame_note(num_rows: int, where: str) -> str:
    return (
        f"{num_rows:,} rows are alike, the first of them {where}: treated as one template with different values, not "
        "as copies, so they may be on different sides of the split"
    )


def _check_sides(sides: Int8, use: SourceUse, shares: Shares) -> None:
    what = section_of(use)
    named = zip(("train", "validation"), shares)
    for side, (name, share) in enumerate(named):
        if share > 0 and (use == "train" or name == "validation") and not np.any(sides == side):
            raise UserError(
                f"{what} has {len(sides)} rows, and data.split.{name} of {share:g} gives 0 of them.",
                "equal rows are on the same side, and a side without rows can be neither trained on nor evaluated.",
                f"add rows, raise data.split.{name}, or give separate rows in data.validation.",
            )
