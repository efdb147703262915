"""How long before its end a job is told: one step, one save, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

STEP: Final = "speed/step_seconds"
SAVE: Final = "checkpoint/seconds"
LEAST_SECONDS: Final = 120
"""For a step and a save together; what was planned may be wrong, and short runs measure little."""
AFTER_SECONDS: Final = 60
"""For the ranks' end and the requeue. Slurm may also speak up to 60 s early (sbatch, --signal), which only adds."""
SAVED_BYTES_PER_SECOND: Final = 200e6
"""To a shared disk while others write there too, with reading back; taken where nothing was measured."""


@dataclass(frozen=True)
class Lead:
    """How long before its end the job is told.

    Attributes:
        seconds: So long.
        reason: Why, in words.
    """

    seconds: int
    reason: str


def signal_lead(
    figures: Iterable[Mapping[str, float]], step_seconds: float | None, checkpoint_bytes: int | None
) -> Lead:
    """The longest step and save that were measured; else what is planned.

    Args:
        figures: Lines of RUN/metrics.jsonl.
        step_seconds: Of one step as planned; None where it is not known.
        checkpoint_bytes: Of one checkpoint; None where it is not known.
    """
    lines = list(figures)
    steps = [line[STEP] for line in lines if STEP in line]
    saves = [line[SAVE] for line in lines if SAVE in line]
    step = max(steps) if steps else step_seconds or 0.0
    save = max(saves) if saves else (checkpoint_bytes or 0) / SAVED_BYTES_PER_SECOND
    how = f"a step of {step:,.1f} s and a save of {save:,.1f} s " + ("were measured" if saves else "are expected")
    if not step + save:
        how = "neither step nor save is known"
    needed = math.ceil(step + save)
    least = f", {LEAST_SECONDS} s at least" if needed < LEAST_SECONDS else ""
    return Lead(max(needed, LEAST_SECONDS) + AFTER_SECONDS, f"{how}{least}, and {AFTER_SECONDS} s to end")
