"""How evenly the split shares out each stratum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from packhorse.data.audit_report import SplitAudit

SHARED_SIDES: Final = ("train", "validation", "test")
# Strata are kept within one percentage point, where one row is no more than that.
LARGEST_DEVIATION: Final = 0.01


@dataclass(frozen=True)
class Part:
    """One side's part of a stratum: rows, share of the stratum (0 to 1), that share minus the one asked for."""

    rows: int
    share: float
    deviation: float


@dataclass(frozen=True)
class StratumBalance:
    """One stratum.

    Attributes:
        name: Its values.
        rows: Rows on all sides.
        parts: Side to its part.
        is_off: Whether a side has more than one point and more than one row too many or too few.
    """

    name: str
    rows: int
    parts: dict[str, Part]
    is_off: bool


def balance(splits: Mapping[str, SplitAudit], shares: tuple[float, float, float]) -> tuple[StratumBalance, ...]:
    """Return the strata with their shares of the sides, largest first; none where there is one stratum or one side.

    Rows of `data.retain` are another population and do not count, nor do those of `data.validation`.

    Args:
        splits: Side to its figures.
        shares: Asked for: train, validation, test.
    """
    asked = {side: share for side, share in zip(SHARED_SIDES, shares) if share > 0}
    names = {name for side in asked.keys() & splits.keys() for name in splits[side].strata}
    if len(names) < 2 or len(asked) < 2:
        return ()
    strata = [
        _stratum(name, {side: splits[side].strata.get(name, 0) if side in splits else 0 for side in asked}, asked)
        for name in names
    ]
    return tuple(sorted(strata, key=lambda stratum: (-stratum.rows, stratum.name)))


def _stratum(name: str, rows: Mapping[str, int], asked: Mapping[str, float]) -> StratumBalance:
    total = sum(rows.values())
    parts = {}
    for side, count in rows.items():
        share = count / total if total else 0.0
        parts[side] = Part(count, share, share - asked[side])
    worst = max(abs(part.deviation) for part in parts.values())
    return StratumBalance(name, total, parts, worst > LARGEST_DEVIATION and worst * total > 1)
