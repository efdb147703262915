"""The documents to pack: a whole row or a part of it; of a preference pair both answers; an answer and its mismatch.

For KTO, each row has a second document: its prompt with the answer of another row of its side. It is not trained on;
its log-probability estimates the KL divergence (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1). Both answers
have nearly the same length, and the partner is fixed here, so that the estimate depends on no batch.

Shapes: R rows of the spool, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packhorse.data.decide import Decision
from packhorse.data.gather.spool import Columns, Mapped, selected_pieces
from packhorse.data.ledger import SIDES
from packhorse.data.packs.packing import Packing, pack
from packhorse.errors import UserError
from packhorse.recipe.objectives import Objective

Int64 = NDArray[np.int64]
NO_PARTNER = -1


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents to pack, in the order of the rows.

    Attributes:
        rows: int64 [D], index of each document's row.
        starts: int64 [D], position of each document's first token in the spool.
        lengths: int64 [D], tokens.
        labels: int64 [D], supervised tokens except the first token.
        per_row: Documents of a row, which follow each other and share a pack; 1 also for the parts of a split row.
        partners: int64 [D], row of the answer of a mismatched document, -1 for other documents; None without such.
    """

    rows: Int64
    starts: Int64
    lengths: Int64
    labels: Int64
    per_row: int = 1
    partners: Int64 | None = None

    def of(self, wanted: NDArray[np.bool_]) -> Documents:
        """Return the documents selected by a mask, bool [D]."""
        partners = None if self.partners is None else self.partners[wanted]
        rows, starts, lengths, labels = (each[wanted] for each in (self.rows, self.starts, self.lengths, self.labels))
        return Documents(rows, starts, lengths, labels, self.per_row, partners)

    @property
    def item_lengths(self) -> Int64:
        """int64 [D / per_row], tokens of what stays together in a pack."""
        return self.lengths if self.per_row == 1 else self.lengths.reshape(-1, self.per_row).sum(1)

    @property
    def item_rows(self) -> Int64:
        """int64 [D / per_row], row of what stays together in a pack."""
        return self.rows[:: self.per_row]

    def packed(self, length_tokens: int, how: str, seed: int) -> Packing:
        """Return the packs of the documents (arguments as in `pack`); those of a row are next to each other."""
        packing = pack(self.item_lengths, length_tokens, how, seed)
        if self.per_row == 1:
            return packing
        order = packing.order[:, None] * self.per_row + np.arange(self.per_row)
        return Packing(order.ravel(), packing.offsets * self.per_row)

    def pieces(self, values: Mapped, columns: Columns) -> Iterator[NDArray[Any]]:
        """Yield the documents' part of a file of the spool (token ids or masks), end to end, in pieces of any size."""
        if self.partners is None:
            yield from selected_pieces(values, self.starts, self.lengths)
            return
        row_starts, cuts, partners = columns.starts.tolist(), columns.cuts, self.partners.tolist()
        for start, length, row, partner in zip(self.starts.tolist(), self.lengths.tolist(), self.rows, partners):
            cut = length if partner == NO_PARTNER else int(cuts[row])
            yield values[start : start + cut]
            if partner != NO_PARTNER:
                yield values[row_starts[partner] + int(cuts[partner]) : row_starts[partner + 1]]

    def values(self, columns: Columns) -> dict[str, NDArray[np.float64]]:
        """Return float64 [D] by name: the verdict on each document, or the margin by which it must lead the next."""
        if len(columns.verdicts):
            verdicts = columns.verdicts[self.rows]
            verdicts[1::2] = 0
            return {"verdict": verdicts}
        if len(columns.margins) == 0 or np.isnan(columns.margins[self.rows]).any():
            return {}
        return {"margin": columns.margins[self.rows]}


def partners_of(columns: Columns, decision: Decision, objective: Objective) -> Int64 | None:
    """Return int64 [R], the row whose answer follows each row's prompt in its mismatched document; -1 if dropped.

    Partners are on the same side of the split, are not copies of each other, and are neighbours by the length of their
    answers, whatever the order of the rows.

    Returns:
        None for objectives without verdicts.

    Raises:
        UserError: All rows of a side are copies of one row.
    """
    if objective.takes != "verdicts":
        return None
    partners = np.full(len(columns), NO_PARTNER)
    answers = columns.tokens - columns.cuts
    for number, side in enumerate(SIDES):
        rows = np.flatnonzero(decision.sides == number)
        if len(rows) == 0:
            continue
        by_key = rows[np.lexsort((columns.keys[rows, 1], columns.keys[rows, 0], answers[rows]))]
        _, first = np.unique(decision.equal[by_key], return_index=True)
        kept = by_key[np.sort(first)]
        if len(kept) == 1:
            raise UserError(
                f"all {side} rows are equal (number of rows: {len(rows)}).",
                f"{objective.kind} estimates the KL divergence on prompts with the answer of another row.",
                "add rows, or give the shares of data.split to fewer sides.",
            )
        places = np.arange(len(kept))
        # Neighbours are each other's partners; the last of an odd number takes the one before.
        neighbour = np.where(places ^ 1 < len(kept), places ^ 1, places - 1)
        place_of = np.empty(len(columns), np.int64)
        place_of[decision.equal[kept]] = places
        partners[rows] = kept[neighbour[place_of[decision.equal[rows]]]]
    return partners


def row_lengths(columns: Columns, partners: Int64 | None) -> Int64:
    """Return int64 [R], the tokens of all documents of each row."""
    if partners is None:
        return columns.tokens
    answers = columns.tokens - columns.cuts
    return np.where(partners == NO_PARTNER, columns.tokens, columns.tokens + columns.cuts + answers[partners])


def two_documents(columns: Columns, rows: Int64, partners: Int64 | None) -> Documents:
    """Return both documents of each row: two answers, or the row's own answer and its partner's."""
    starts, cuts, tokens = columns.starts[rows], columns.cuts[rows], columns.tokens[rows]
    labels, cut_labels = columns.labels[rows], columns.cut_labels[rows]
    if partners is None:
        second = starts + cuts, tokens - cuts, labels - cut_labels
        first, mates = (starts, cuts, cut_labels), None
    else:
        of = partners[rows]
        second = starts, cuts + columns.tokens[of] - columns.cuts[of], columns.labels[of]
        first, mates = (starts, tokens, labels), _in_turn(np.full(len(rows), NO_PARTNER), of)
    begins, lengths, supervised = map(_in_turn, first, second)
    return Documents(np.repeat(rows, 2), begins, lengths, supervised, 2, mates)


def _in_turn(first: Int64, second: Int64) -> Int64:
    return np.stack([first, second], axis=1).ravel()
