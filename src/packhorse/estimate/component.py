"""What an estimate is made of: named parts with a reason each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Component:
    """One part of an amount of memory.

    Attributes:
        name: Such as `weights`; the same in every estimate.
        bytes: How much of it.
        reason: Where it comes from, in a line.
    """

    name: str
    bytes: int
    reason: str


def total_bytes(components: Iterable[Component]) -> int:
    """Their sum."""
    return sum(component.bytes for component in components)
