"""Decide over all rows and pack them: the common part of `prepare`, which writes the packs, and `check`.

`data.over_long` says what happens to a row longer than T: it is cut, split or dropped, or nothing is prepared.

Shapes: R rows of the spool, D documents to pack, T tokens in a pack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.decide import KEPT, REASONS, TEST, TRAIN, Decision, decide
from packhorse.data.documents import Documents, partners_of, row_lengths, two_documents
from packhorse.data.gather.gather import GatheredRows, gather
from packhorse.data.gather.source_pass import BatchCallback
from packhorse.data.gather.spool import Spool
from packhorse.data.ledger import SIDES, Entry, Ledger
from packhorse.data.packs.packing import Packing, split_long, suggest_length
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe

Int64 = NDArray[np.int64]

# The packs are part of the prepared data, whatever the seed of a run.
PACKING_SEED: Final = 0
HELD_OUT_PACKING: Final = "best_fit"


@dataclass(frozen=True, eq=False)
class FittedRows:
    """Rows after `data.over_long` was applied: the decision, the documents to pack, and the ledger."""

    decision: Decision
    documents: Documents
    ledger: Ledger

    def side(self, name: str) -> Documents:
        """Return the documents of a side of the split."""
        return self.documents.of(self.decision.sides[self.documents.rows] == SIDES.index(name))


def fit_lengths(
    spool: Spool, decision: Decision, recipe: Recipe, num_bad: int, is_chat: NDArray[np.bool_]
) -> FittedRows:
    """Apply `data.over_long` to rows longer than T.

    Args:
        spool: All rows.
        decision: Decision about the rows so far.
        recipe: Recipe with T and `data.over_long`.
        num_bad: Rows that never came into the spool.
        is_chat: bool [R], whether a row is a chat.

    Raises:
        UserError: A row is longer than T under `raise`, a chat under `split`; or no row is left to train on.
    """
    most, choice = recipe.batch.length, recipe.data.over_long
    partners = partners_of(spool.columns, decision, recipe.objective)
    tokens = row_lengths(spool.columns, partners)
    over_long = (tokens > most) & (decision.losses == KEPT)
    if over_long.any():
        _check_lengths(tokens[decision.losses == KEPT], recipe)
        if choice == "split" and (over_long & is_chat).any():
            raise _split_chat(tokens[over_long & is_chat], most)
    losses, sides = decision.losses.copy(), decision.sides.copy()
    if choice == "drop":
        losses[over_long] = REASONS.index("over_long")
    kept = np.flatnonzero(losses == KEPT)
    if recipe.objective.documents_per_row == 2:
        documents = two_documents(spool.columns, kept, partners)
    else:
        documents = _documents(spool, kept, most, choice)
    if choice in ("truncate", "split"):
        documents = _without_empty(documents, over_long, losses)
    sides[losses != KEPT] = -1
    fitted = replace(decision, losses=losses, sides=sides)
    if not np.any(sides == 0):
        raise UserError(
            f"no row is left to train on: each is longer than batch.length, which is {most}.",
            f"data.over_long is {choice}, which leaves nothing of such rows.",
            "raise batch.length.",
        )
    ledger = _ledger(tokens, fitted, documents, num_bad)
    return FittedRows(fitted, documents, ledger)


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
    # A part begins where the previous part of its row ends.
    before = np.cumsum(parts) - parts
    first = np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    begin = starts[row_of] + before - before[first]
    changed = np.repeat(num_parts > 1, num_parts)
    return Documents(row_of, begin, parts, _labels(spool, begin, parts, np.repeat(labels, num_parts), changed))


def _labels(spool: Spool, starts: Int64, lengths: Int64, whole: Int64, changed: NDArray[np.bool_]) -> Int64:
    """Return int64 [D], the labels of each document; counted again where a document is not the whole row."""
    supervised, labels = spool.supervised(), whole.copy()
    for at in np.flatnonzero(changed).tolist():
        labels[at] = np.count_nonzero(supervised[starts[at] + 1 : starts[at] + lengths[at]])
    return labels


def _without_empty(documents: Documents, over_long: NDArray[np.bool_], losses: NDArray[np.int8]) -> Documents:
    """Drop rows of which truncation left nothing to train on, and note their loss in `losses`."""
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
        split_rows=int(np.count_nonzero(np.bincount(documents.rows, minlength=len(tokens)) > documents.per_row)),
    )


def _split_chat(lengths: Int64, most: int) -> UserError:
    return UserError(
        f"data.over_long is split, and {len(lengths)} chats are longer than batch.length, which is {most}; the longest "
        f"has {lengths.max()} tokens.",
        "only plain text can be split: an answer without its question would be trained as an answer to nothing.",
        f"set batch.length to {lengths.max()}, or data.over_long to drop or truncate.",
    )


def _check_lengths(lengths: Int64, recipe: Recipe) -> None:
    """Raise UserError for a T that no row fits, and, under `raise`, one that some row does not fit."""
    most = recipe.batch.length
    num_over = int(np.count_nonzero(lengths > most))
    shortest, longest = int(lengths.min()), int(lengths.max())
    for_most = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    if num_over == len(lengths) and recipe.data.over_long != "split":
        raise UserError(
            f"batch.length is {most}, and every row is longer: {shortest} to {longest} tokens.",
            "no row would stay whole.",
            f"set batch.length to {for_most} (fits 99 % of the {len(lengths)} rows) or {longest} (fits all).",
        )
    if recipe.data.over_long == "raise":
        paired = recipe.objective.documents_per_row == 2
        others = "drop, which is" if paired else "drop, truncate or split, which are"
        raise UserError(
            f"{num_over} of {len(lengths)} rows are longer than batch.length, which is {most}; the longest has "
            f"{longest} tokens{' in its two documents' if paired else ''}.",
            "cutting or dropping rows without saying so would lose data.",
            f"set batch.length to {for_most} (fits 99 %) or {longest} (fits all), or set data.over_long to {others} "
            "counted in the ledger.",
        )


@dataclass(frozen=True, eq=False)
class PackedRows:
    """All rows, the decision about each, and the packs of each side.

    Attributes:
        gathered: All rows.
        fitted: Decision, documents and ledger.
        packings: Side of the split to its packs.
        notes: Sentences that the user should read.
        test_rows: 16 hex digits over the content of the test rows, independent of T; empty if there are none.
    """

    gathered: GatheredRows
    fitted: FittedRows
    packings: dict[str, Packing]
    notes: tuple[str, ...]
    test_rows: str

    @property
    def decision(self) -> Decision:
        """Decision about each row."""
        return self.fitted.decision

    def side(self, name: str) -> Documents:
        """Return the documents of a side of the split."""
        return self.fitted.side(name)


def pack_rows(
    recipe: Recipe, folder: Path, watch: BatchCallback | None = None, with_prompts: bool = False
) -> PackedRows:
    """Read all rows into a spool in `folder`, decide over them and pack their lengths (arguments as in `gather`).

    Raises:
        UserError: Anything about rows, tokenizer, template or lengths that the user can fix.
    """
    gathered = gather(recipe, folder, watch, with_prompts)
    decision = decide(gathered, recipe)
    fitted = fit_lengths(gathered.spool, decision, recipe, gathered.num_bad, gathered.is_chat)
    packings = {
        side: documents.packed(recipe.batch.length, _packing_of(recipe, side), PACKING_SEED)
        for side in SIDES
        if len((documents := fitted.side(side)).rows)
    }
    check_group_field(recipe, packings, gathered.fields_of_all(decision.sides > TRAIN))
    notes = (*gathered.notes, *decision.notes, *_packing_note(fitted.side("train"), packings["train"], recipe))
    return PackedRows(gathered, fitted, packings, notes, _test_rows(gathered.spool, decision))


def check_group_field(recipe: Recipe, sides: Collection[str], fields: Collection[str]) -> None:
    """Refuse an `evaluation.group_by` that not every evaluated row has.

    Args:
        recipe: Recipe with the field.
        sides: Sides of the split that have rows.
        fields: Fields that every evaluated row has.

    Raises:
        UserError: The field is not among them.
    """
    name = recipe.evaluation.group_by
    if name is not None and not {"validation", "retain"}.isdisjoint(sides) and name not in fields:
        raise UserError(
            f"evaluation.group_by is {name}, and not every evaluated row has this field.",
            "the evaluation table has one line per value of it.",
            f"set it to a field that every row has: {', '.join(fields) or 'there is none, so remove it'}.",
        )


def _test_rows(spool: Spool, decision: Decision) -> str:
    keys = spool.columns.keys[decision.sides == TEST]
    if len(keys) == 0:
        return ""
    in_order = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    return hashlib.sha256(in_order.astype("<u8").tobytes()).hexdigest()[:16]


def fill(documents: Documents, packing: Packing, length_tokens: int) -> float:
    """Return tokens ÷ (packs × T), from 0 to 1."""
    return float(documents.lengths.sum() / (packing.num_packs * length_tokens))


def _packing_of(recipe: Recipe, side: str) -> str:
    return recipe.data.packing if side == "train" else HELD_OUT_PACKING


def _packing_note(documents: Documents, packing: Packing, recipe: Recipe) -> list[str]:
    if recipe.data.packing == "none":
        return []
    better = suggest_length(documents.item_lengths, recipe.batch.length)
    if better is None:
        return []
    length, filled = better
    now = fill(documents, packing, recipe.batch.length)
    return [
        f"packs of batch.length {recipe.batch.length:,} are {now:.1%} full, as these lengths combine badly; "
        f"batch.length {length:,} would fill them to {filled:.1%}"
    ]
