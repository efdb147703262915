"""Refuses a run that its GPUs cannot hold, before anything is read or allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packhorse.errors import UserError
from packhorse.estimate.case import Case
from packhorse.estimate.component import Component
from packhorse.estimate.search.changes import Change, changes_that_fit
from packhorse.estimate.search.compare import Wanted, host_words

GIB: Final = 2**30
MOST_NAMED: Final = 3


def check_memory(wanted: Wanted, case: Case) -> None:
    """Refuses what needs more than the card has, or more than the host where its memory is known.

    Args:
        wanted: What was planned.
        case: Its plan.

    Raises:
        UserError: It does, with the largest parts, and the changes that fit.
    """
    if case.fits:
        return
    fix = f"{_fix(changes_that_fit(wanted, case))}; or --force, if you know better."
    if case.margin >= 0:
        largest = _largest(case.storage.host)
        raise UserError(f"the run needs {host_words(case)}.", f"most of it: {largest}.", fix)
    card, peak = case.basis.gpu, case.memory.peak
    raise UserError(
        f"the run needs {case.required_bytes / GIB:.1f} GiB on each GPU, and {card.name} has"
        f" {card.memory_bytes / GIB:.1f} GiB.",
        f"it is fullest in {peak.name}: {_largest(peak.components)}.",
        fix,
    )


def _largest(components: Sequence[Component]) -> str:
    parts = sorted(components, key=lambda part: -part.bytes)[:MOST_NAMED]
    return ", ".join(f"{part.name} {part.bytes / GIB:.1f} GiB" for part in parts)


def _fix(changes: list[Change]) -> str:
    if not changes:
        return "see `packhorse plan RECIPE --gpus auto` for the least hardware that holds it"
    said = [
        f"{change.words} ({change.case.required_bytes / GIB:.1f} GiB, {1 / (1 + change.slower) - 1:+.0%} speed,"
        f" {change.result})"
        for change in changes[:MOST_NAMED]
    ]
    return f"set {', or '.join(said)}"
