"""How evenly the rows of each stratum are divided between the sides of the split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from packhorse.data.audit_report import SplitAudit

SHARED_SIDES: Final = ("train", "validation", "test")
# Strata deviate by at most one percentage point, or by one row where a row is more than that.
LARGEST_DEVIATION: Final = 0.01


@dataclass(frozen=True)
class Part:
    """Rows of a stratum on one side: number, share of the stratum (0 to 1), share minus the requested share."""

    rows: int
    share: float
    deviation: float


@dataclass(frozen=True)
class StratumBalance:
    """Division of one stratum.

    Attributes:
        name: Values of the stratum.
        rows: Rows on all sides.
        parts: Name of the side to its part.
        is_off: Whether a side deviates by more than one percentage point and more than one row.
    """

    name: str
    rows: int
    parts: dict[str, Part]
    is_off: bool


def balance(splits: Mapping[str, SplitAudit], shares: tuple[float, float, float]) -> tuple[StratumBalance, ...]:
    """Return the strata by size, largest first; empty if there is only one stratum or one side.

    Rows of `data.retain` and `data.validation` do not count.

    Args:
        splits: Name of the side to its figures.
        shares: Requested shares of train, validation and test.
    """
    requested = {side: share for side, share in zip(SHARED_SIDES, shares) if share > 0}
    names = {name for side in requested.keys() & splits.keys() for name in splits[side].strata}
    if len(names) < 2 or len(requested) < 2:
        return ()
    strata = []
    for name in names:
        rows = {side: splits[side].strata.get(name, 0) if side in splits else 0 for side in requested}
        strata.append(_stratum(name, rows, requested))
    return tuple(sorted(strata, key=lambda stratum: (-stratum.rows, stratum.name)))


def _stratum(name: str, rows: Mapping[str, int], requested: Mapping[str, float]) -> StratumBalance:
    total = sum(rows.values())
    parts = {}
    for side, count in rows.items():
        share = count / total if total else 0.0
        parts[side] = Part(count, share, share - requested[side])
    worst = max(abs(part.deviation) for part in parts.values())
    return StratumBalance(name, total, parts, worst > LARGEST_DEVIATION and worst * total > 1)
