"""The ledger as lines with percentages that add up to 100, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from packhorse.data.ledger import LOSSES, SIDES, Entry, Ledger

# Percentages have two decimals: 100 % are ten thousand parts.
_PARTS: Final = 10_000
CUT: Final = "tokens_cut"
SIDE_WORDS: Final = {
    "train": "train: trained on",
    "validation": "validation: evaluated during training",
    "test": "test: sealed",
    "retain": "retain: old tasks, evaluated",
}


@dataclass(frozen=True)
class LedgerLine:
    """Where a part of the rows went.

    Attributes:
        name: Key of `LOSSES`, one of `SIDES`, or `tokens_cut`.
        words: Meaning of the line.
        is_loss: Whether these rows or tokens are dropped.
        rows: Number of rows.
        tokens: Number of their tokens.
        rows_percent: Share of all rows; the lines add up to 100.
        tokens_percent: Share of all tokens; the lines add up to 100.
    """

    name: str
    words: str
    is_loss: bool
    rows: int
    tokens: int
    rows_percent: str
    tokens_percent: str


def ledger_lines(ledger: Ledger) -> tuple[LedgerLine, ...]:
    """Return one line per destination of rows or tokens, in the order in which they are removed."""
    cut = Entry(rows=0, tokens=ledger.tokens_cut)
    entries: list[tuple[str, str, bool, Entry]] = [
        *((name, words, True, ledger.losses.get(name, Entry())) for name, words in LOSSES.items()),
        (CUT, "cut off rows that are kept", True, cut),
        *((name, SIDE_WORDS[name], False, ledger.kept.get(name, Entry())) for name in SIDES),
    ]
    rows = percentages([entry.rows for *_, entry in entries])
    tokens = percentages([entry.tokens for *_, entry in entries])
    return tuple(
        LedgerLine(name, words, is_loss, entry.rows, entry.tokens, rows[at], tokens[at])
        for at, (name, words, is_loss, entry) in enumerate(entries)
    )


def percentages(counts: Sequence[int]) -> list[str]:
    """Return each count's share in percent with two decimals, rounded so that the shares add up to 100.

    The largest remainders are rounded up (Hamilton's method). A share above 0 that rounds to 0 reads `<0.01 %`.
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
