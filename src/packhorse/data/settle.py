"""From a recipe to what would be packed: what `prepare` writes and `check` shows, so that both see the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from packhorse.data.decide import TEST, Decision, decide
from packhorse.data.gather import Gathered, gather
from packhorse.data.ledger import SIDES
from packhorse.data.lengths import Documents, Fitted, fit_lengths
from packhorse.data.packs.packing import Packing, pack, suggest_length
from packhorse.data.source_pass import Watch
from packhorse.data.spool import Spool
from packhorse.recipe.schema import Recipe

# The packs are part of the prepared data, whatever seed a run has.
PACKING_SEED: Final = 0
HOW_TO_PACK_HELD_OUT: Final = "best_fit"


@dataclass(frozen=True, eq=False)
class Settled:
    """All rows, what becomes of them, and the packs of each side.

    Attributes:
        gathered: The rows.
        fitted: What becomes of each.
        packings: Side of the split to its packs.
        notes: What a person should know, in sentences.
        test_rows: 16 hex digits over what the test rows say, whatever T is; empty where there are none.
    """

    gathered: Gathered
    fitted: Fitted
    packings: dict[str, Packing]
    notes: tuple[str, ...]
    test_rows: str

    @property
    def decision(self) -> Decision:
        """What becomes of each row."""
        return self.fitted.decision

    def side(self, name: str) -> Documents:
        """The documents of a side of the split."""
        return self.fitted.side(name)


def settle(recipe: Recipe, folder: Path, watch: Watch | None = None, with_prompts: bool = False) -> Settled:
    """Read all rows into a spool in `folder`, decide over each and pack the lengths; arguments as of `gather`.

    Raises:
        UserError: Anything about rows, tokenizer, template or lengths that the user can mend.
    """
    gathered = gather(recipe, folder, watch, with_prompts)
    decision = decide(gathered, recipe)
    fitted = fit_lengths(gathered.spool, decision, recipe, gathered.num_bad, gathered.is_chat)
    packings = {
        side: pack(lengths, recipe.batch.length, _how(recipe, side), PACKING_SEED)
        for side in SIDES
        if len(lengths := fitted.side(side).lengths)
    }
    notes = (*decision.notes, *_packing_note(fitted.side("train"), packings["train"], recipe))
    return Settled(gathered, fitted, packings, notes, _test_rows(gathered.spool, decision))


def _test_rows(spool: Spool, decision: Decision) -> str:
    keys = spool.columns.keys[decision.sides == TEST]
    if len(keys) == 0:
        return ""
    in_order = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    return hashlib.sha256(in_order.astype("<u8").tobytes()).hexdigest()[:16]


def fill(documents: Documents, packing: Packing, length_tokens: int) -> float:
    """Return tokens ÷ (packs × T), from 0 to 1."""
    return float(documents.lengths.sum() / (packing.num_packs * length_tokens))


def _how(recipe: Recipe, side: str) -> str:
    return recipe.data.packing if side == "train" else HOW_TO_PACK_HELD_OUT


def _packing_note(documents: Documents, packing: Packing, recipe: Recipe) -> list[str]:
    if recipe.data.packing == "none":
        return []
    better = suggest_length(documents.lengths, recipe.batch.length)
    if better is None:
        return []
    length, filled = better
    now = fill(documents, packing, recipe.batch.length)
    return [
        f"packs of batch.length {recipe.batch.length:,} are {now:.1%} full, as these lengths go badly together; "
        f"batch.length {length:,} would fill them to {filled:.1%}"
    ]
