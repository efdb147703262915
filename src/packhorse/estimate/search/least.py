"""The least hardware that holds a run: 1, 2, 4, 8 ... GPUs of each kind, under whatever engine then fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from packhorse.estimate.case import Basis
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.search.compare import Checkpointing, Wanted, Way, fastest, ways
from packhorse.plan.topology import DeviceRequest
from packhorse.recipe.schema import Engine

MOST_GPUS: Final = 1024
ALONE: Final[tuple[Engine, ...]] = ("single",)
SHARED: Final[tuple[Engine, ...]] = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Least:
    """The fewest GPUs of a kind.

    Attributes:
        gpu: The kind.
        count: How many; None where not even `MOST_GPUS` hold it.
        way: How they then run it fastest.
        refused: What the packs or the model refuse, where no number of GPUs holds it.
    """

    gpu: GpuProfile
    count: int | None
    way: Way | None
    refused: str = ""


def least_hardware(wanted: Wanted, basis: Basis, gpus: Sequence[GpuProfile]) -> list[Least]:
    """For each kind the fewest that hold the run with a margin; those that need fewest gigabytes in all come first."""
    found: list[Least] = []
    missing, refused, count = list(gpus), "", 1
    while missing and count <= MOST_GPUS and not refused:
        tried = ways(
            replace(wanted, ask=DeviceRequest(count)), basis, ALONE if count == 1 else SHARED, (False, True), None
        )
        errors = [way.error for way in tried if way.error is not None]
        if len(errors) == len(tried):
            refused = errors[-1].mistakes[0].fact
        for gpu in list(missing):
            best = _best_on(gpu, tried)
            if best is not None:
                found.append(Least(gpu, count, best))
                missing.remove(gpu)
        count *= 2
    return [*sorted(found, key=_amount), *(Least(gpu, None, None, refused) for gpu in missing)]


def _best_on(gpu: GpuProfile, tried: Sequence[Way]) -> Way | None:
    """The fastest that fits; of an engine the largest pass that does, which is never slower than a smaller one."""
    largest: dict[tuple[Engine, Checkpointing], Way] = {}
    for way in tried:
        case = way.case.on(gpu) if way.case is not None else None
        if case is not None and case.is_comfortable:
            largest[way.engine, way.checkpointing] = replace(way, case=case)
    return fastest(list(largest.values()))


def _amount(least: Least) -> tuple[int, str]:
    return (least.count or 0) * least.gpu.memory_bytes, least.gpu.name
