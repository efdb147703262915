"""What a pack's length does to a row: it fits, is cut, is parted, is dropped, or stops all with the length that fits.

Shapes: R rows of the spool, D documents that are packed, T tokens of a pack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from packhorse.data.decide import KEPT, REASONS, Decision
from packhorse.data.ledger import SIDES, Entry, Ledger
from packhorse.data.packs.packing import split_long
from packhorse.data.spool import Spool
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Documents:
    """What is packed, in the order of the rows: a row, its beginning, or a part of it.

    Attributes:
        rows: int64 [D], index of each document's row.
        starts: int64 [D], where it begins in the spool.
        lengths: int64 [D], tokens.
        labels: int64 [D], supervised tokens but the first.
    """

    rows: Int64
    starts: Int64
    lengths: Int64
    labels: Int64

    def of(self, wanted: NDArray[np.bool_]) -> Documents:
        """Return the documents that are wanted, bool [D]."""
        return Documents(self.rows[wanted], self.starts[wanted], self.lengths[wanted], self.labels[wanted])


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows after lengths are dealt with: the decision, what is packed, and the ledger of all of it."""

    decision: Decision
    documents: Documents
    ledger: Ledger

    def side(self, name: str) -> Documents:
        """Return the documents of a side of the split."""
        return self.documents.of(self.decision.sides[self.documents.rows] == SIDES.index(name))


def fit_lengths(spool: Spool, decision: Decision, recipe: Recipe, num_bad: int, is_chat: NDArray[np.bool_]) -> Fitted:
    """Do with rows longer than T what `data.over_long` says.

    Args:
        spool: All rows.
        decision: What became of them so far.
        recipe: Says T and `data.over_long`.
        num_bad: Rows that never came into the spool.
        is_chat: bool [R], whether a row is a chat.

    Raises:
        UserError: A row is longer than T under `raise`, a chat under `split`; or none is left to train on.
    """
    most, choice = recipe.batch.length, recipe.data.over_long
    columns = spool.columns
    over_long = (columns.tokens > most) & (decision.losses == KEPT)
    if over_long.any():
        _check_lengths(columns.tokens[decision.losses == KEPT], recipe)
        if choice == "split" and (over_long & is_chat).any():
            raise _parted_chat(columns.tokens[over_long & is_chat], most)
    losses, sides = decision.losses.copy(), decision.sides.copy()
    if choice == "drop":
        losses[over_long] = REASONS.index("over_long")
    documents = _documents(spool, np.flatnonzero(losses == KEPT), most, choice)
    if choice in ("truncate", "split"):
        documents = _without_empty(documents, over_long, losses)
    sides[losses != KEPT] = -1
    fitted = replace(decision, losses=losses, sides=sides)
    if not np.any(sides == 0):
        raise UserError(
            f"no row is left to train on: each is longer than batch.length, which is {most}.",
            f"data.over_long, which is {choice}, leaves nothing of them.",
            "raise batch.length.",
        )
    ledger = _ledger(columns.tokens, fitted, documents, num_bad)
    return Fitted(fitted, documents, ledger)


def _documents(spool: Spool, rows: Int64, most: int, choice: str) -> Documents:
    columns, starts = spool.columns, spool.columns.starts
    lengths, labels = columns.tokens[rows], columns.labels[rows]
    if not (lengths > most).any():
        return Documents(rows, starts[rows], lengths, labels)
    if choice == "truncate":
        cut = np.minimum(lengths, most)
        return Documents(rows, starts[rows], cut, _labels(spool, starts[rows], cut, labels, lengths > most))
    num_parts, parts = split_long(lengths, most)
    row_of = np.repeat(rows, num_parts)
    # Each part begins where the ones before it in its row end.
    before = np.cumsum(parts) - parts
    first = np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    begin = starts[row_of] + before - before[first]
    changed = np.repeat(num_parts > 1, num_parts)
    return Documents(row_of, begin, parts, _labels(spool, begin, parts, np.repeat(labels, num_parts), changed))


def _labels(spool: Spool, starts: Int64, lengths: Int64, whole: Int64, changed: NDArray[np.bool_]) -> Int64:
    """Count supervised tokens again where a document is not the whole row."""
    supervised, labels = spool.supervised(), whole.copy()
    for at in np.flatnonzero(changed).tolist():
        labels[at] = np.count_nonzero(supervised[starts[at] + 1 : starts[at] + lengths[at]])
    return labels


def _without_empty(documents: Documents, over_long: NDArray[np.bool_], losses: NDArray[np.int8]) -> Documents:
    """Take out rows of which truncation left nothing to train on; their loss is noted in `losses`."""
    taught = np.zeros(len(losses), np.bool_)
    taught[documents.rows[documents.labels > 0]] = True
    emptied = over_long & ~taught & (losses == KEPT)
    losses[emptied] = REASONS.index("masked_out")
    return documents.of(~emptied[documents.rows])


def _ledger(tokens: Int64, decision: Decision, documents: Documents, num_bad: int) -> Ledger:
    losses = {
        reason: Entry(rows=int(np.count_nonzero(lost)), tokens=int(tokens[lost].sum()))
        for number, reason in enumerate(REASONS)
        if (lost := decision.losses == number).any()
    }
    if num_bad:
        losses = {"bad": Entry(rows=num_bad), **losses}
    kept, side_of = {}, decision.sides[documents.rows]
    for number, side in enumerate(SIDES):
        if (rows := int(np.count_nonzero(decision.sides == number))) > 0:
            kept[side] = Entry(rows=rows, tokens=int(documents.lengths[side_of == number].sum()))
    whole = np.bincount(documents.rows, documents.lengths, len(tokens)).astype(np.int64)
    stay = decision.losses == KEPT
    cut = np.where(stay, tokens - whole, 0)
    return Ledger(
        rows_in=Entry(rows=len(tokens) + num_bad, tokens=int(tokens.sum())),
        losses=losses,
        kept=kept,
        truncated=int(np.count_nonzero(cut)),
        tokens_cut=int(cut.sum()),
        split_rows=int(np.count_nonzero(np.bincount(documents.rows, minlength=len(tokens)) > 1)),
    )


def _parted_chat(lengths: Int64, most: int) -> UserError:
    return UserError(
        f"data.over_long is split, and {len(lengths)} chats are longer than batch.length, which is {most}; the longest "
        f"has {lengths.max()} tokens.",
        "only plain text can be parted: an answer parted from its question would be learnt as if nothing was asked.",
        f"set batch.length to {lengths.max()}, or data.over_long to drop or truncate.",
    )


def _check_lengths(lengths: Int64, recipe: Recipe) -> None:
    """Refuse a length that no row fits, and, under raise, one that some row does not fit.

    Raises:
        UserError: Names the length that fits 99 % of the rows and the one that fits all.
    """
    most = recipe.batch.length
    num_over = int(np.count_nonzero(lengths > most))
    shortest, longest = int(lengths.min()), int(lengths.max())
    for_most = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    if num_over == len(lengths) and recipe.data.over_long != "split":
        raise UserError(
            f"batch.length is {most}, and every row is longer: {shortest} to {longest} tokens.",
            "no row would be left whole.",
            f"set batch.length to {for_most} (fits 99 % of the {len(lengths)} rows) or {longest} (fits all).",
        )
    if recipe.data.over_long == "raise":
        raise UserError(
            f"{num_over} of {len(lengths)} rows are longer than batch.length, which is {most}; the longest has "
            f"{longest} tokens.",
            "a row that is cut or left out without a word is lost.",
            f"set batch.length to {for_most} (fits 99 %) or {longest} (fits all), or data.over_long to drop, truncate "
            "or split, which is then counted.",
        )
