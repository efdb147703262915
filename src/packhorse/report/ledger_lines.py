"""The ledger as lines with percentages that add up to 100, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from packhorse.data.ledger import LOSSES, SIDES, Entry, Ledger

# Percentages have two decimals: all rows are ten thousand parts.
_PARTS: Final = 10_000
CUT: Final = "tokens_cut"
SIDE_WORDS: Final = {
    "train": "train: learnt from",
    "validation": "validation: evaluated during training",
    "test": "test: sealed",
    "retain": "retain: old skills, evaluated",
}


@dataclass(frozen=True)
class LedgerLine:
    """Where some of the rows went.

    Attributes:
        name: Key of `LOSSES`, one of `SIDES`, or `tokens_cut`.
        words: What it means.
        is_loss: Whether these rows, or tokens, are left out.
        rows: Rows.
        tokens: Their tokens.
        rows_percent: Share of all rows; these add up to 100 over the lines.
        tokens_percent: Share of all tokens; these too.
    """

    name: str
    words: str
    is_loss: bool
    rows: int
    tokens: int
    rows_percent: str
    tokens_percent: str


def ledger_lines(ledger: Ledger) -> tuple[LedgerLine, ...]:
    """Return a line for every way that a row or a token can go, in the order in which they are taken out."""
    cut = Entry(rows=0, tokens=ledger.tokens_cut)
    ways: list[tuple[str, str, bool, Entry]] = [
        *((name, words, True, ledger.losses.get(name, Entry())) for name, words in LOSSES.items()),
        (CUT, "cut off rows that are kept", True, cut),
        *((name, SIDE_WORDS[name], False, ledger.kept.get(name, Entry())) for name in SIDES),
    ]
    rows = percentages([entry.rows for *_, entry in ways])
    tokens = percentages([entry.tokens for *_, entry in ways])
    return tuple(
        LedgerLine(name, words, is_loss, entry.rows, entry.tokens, rows[at], tokens[at])
        for at, (name, words, is_loss, entry) in enumerate(ways)
    )


def percentages(counts: Sequence[int]) -> list[str]:
    """Return each count's share in percent, with two decimals, rounded so that the shares add up to 100.

    The largest remainders are rounded up (Hamilton's method). A share that rounds to 0 and is not reads `<0.01 %`.
    """
    total = sum(counts)
    if total == 0:
        return ["–"] * len(counts)
    parts = [count * _PARTS // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda at: (-(counts[at] * _PARTS % total), at))
    for at in by_remainder[: _PARTS - sum(parts)]:
        parts[at] += 1
    return [_percent(part, count) for part, count in zip(parts, counts)]


def _percent(part: int, count: int) -> str:
    return "<0.01 %" if part == 0 and count > 0 else f"{part / 100:.2f} %"
