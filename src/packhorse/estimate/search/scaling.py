"""How far a recipe scales: the same plan on more and more GPUs, and what stops it.

Weak scaling gives every GPU as much as before, so a step learns from more packs; strong scaling shares the recipe's own
packs, as the maths of a run demands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from packhorse.errors import UserError
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.memory import estimate_memory
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.speed import SpeedEstimate, estimate_speed
from packhorse.model_spec.parameters import Shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

Mode = Literal["weak", "strong"]
Counted = dict[tuple[int, int, bool], int]
"""Bytes of a GPU by number of GPUs, packs a pass, and whether a step has several passes."""

COUNTS: Final = tuple(2**power for power in range(13))
"""1 to 4,096."""
WORTHWHILE: Final = 0.5
"""Below this share of the first point's speed per GPU, more GPUs are mostly waited for."""


@dataclass(frozen=True)
class ScalePoint:
    """One number of GPUs.

    Attributes:
        gpus: In all.
        packs: Of a step.
        estimate: Its time; None where the packs or the model cannot be shared by so many.
        efficiency: Tokens per second of a GPU over those of the first point.
        waiting: Share of the step that is spent on transfers that nothing hides.
        refused: Why there is no estimate.
        required_bytes: Memory of one GPU; the numbers that hold the run are for the reader to see.
    """

    gpus: int
    packs: int
    estimate: SpeedEstimate | None
    efficiency: float
    waiting: float
    refused: str = ""
    required_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return 0.0 if self.estimate is None else self.estimate.tokens_per_second_per_gpu * self.gpus


@dataclass(frozen=True)
class Scaling:
    """A recipe over numbers of GPUs.

    Attributes:
        points: From few to many.
        stopped_at: The first number of GPUs that is not worth its price or cannot be had; None if all are.
        stopped_by: `batch`, `communication` or `fixed costs`.
        reason: In words.
    """

    mode: Mode
    points: tuple[ScalePoint, ...]
    stopped_at: int | None
    stopped_by: str
    reason: str


def scale(
    recipe: Recipe,
    shape: Shape,
    packs: PackFigures,
    gpu: GpuProfile,
    mode: Mode,
    counts: Sequence[int] = COUNTS,
    network_gb: float | None = None,
    counted: Counted | None = None,
) -> Scaling:
    """Plans the recipe for each number of GPUs and finds what stops it.

    Args:
        recipe: Its engine and batch are kept; weak scaling takes its packs for those of 8 GPUs, or of the first count.
        shape: Of its model.
        packs: What they hold.
        gpu: Of which kind.
        mode: What grows with the GPUs.
        counts: Numbers of GPUs, rising.
        network_gb: GB/s of one GPU between nodes; None takes the profile's.
        counted: Memory of a GPU, filled: another mode of the same recipe need not count it again.
    """
    counted = {} if counted is None else counted
    points: list[ScalePoint] = []
    best = 0.0
    for count in counts:
        point = _point(recipe, shape, packs, gpu, mode, count, network_gb, counted)
        if point.estimate is not None:
            best = best or point.estimate.tokens_per_second_per_gpu
            efficiency = point.estimate.tokens_per_second_per_gpu / best
            waiting = waiting_share(point.estimate)
            point = replace(point, efficiency=efficiency, waiting=waiting)
        points.append(point)
    return Scaling(mode, tuple(points), *_stop(points))


def waiting_share(estimate: SpeedEstimate) -> float:
    """Share of a step in which GPUs wait for transfers."""
    names = {each.name for each in estimate.exchanges}
    waited = sum(p.seconds for p in estimate.parts if p.name in names or p.name.startswith("waiting"))
    return waited / estimate.step_seconds


def _point(
    recipe: Recipe,
    shape: Shape,
    packs: PackFigures,
    gpu: GpuProfile,
    mode: Mode,
    count: int,
    network_gb: float | None,
    counted: Counted,
) -> ScalePoint:
    step_packs = recipe.batch.packs if mode == "strong" else max(1, recipe.batch.packs // 8) * count
    try:
        plan = make_plan(recipe.changed("batch", packs=step_packs), DeviceRequest(count), Hardware(1, ()), None)
    except UserError as error:
        return ScalePoint(count, step_packs, None, 0.0, 0.0, error.mistakes[0].fact)
    # All that memory depends on as the number of GPUs and of packs changes.
    depends = (count, plan.batch.micro_packs, plan.batch.accumulation_steps > 1)
    if depends not in counted:
        memory = estimate_memory(plan, shape, packs)
        counted[depends] = memory.required_bytes if memory is not None else 0
    speed = estimate_speed(plan, shape, packs, gpu, network_gb)
    return ScalePoint(count, step_packs, speed, 0.0, 0.0, required_bytes=counted[depends])


def _stop(points: Sequence[ScalePoint]) -> tuple[int | None, str, str]:
    most = max((point.gpus for point in points if point.estimate is not None), default=0)
    first = next((point.gpus for point in points if point.estimate is not None), 0)
    for point in points:
        # Too few GPUs for the mesh stop nothing.
        if point.estimate is None and point.gpus > most:
            return point.gpus, "batch", point.refused
        if point.estimate is not None and point.efficiency < WORTHWHILE:
            waits = point.waiting > 1 - WORTHWHILE / 2 or point.waiting > 0.3
            cause = "communication" if waits else "fixed costs"
            reason = (
                f"a GPU does {point.efficiency:.0%} of what it does on {first}; {point.waiting:.0%} of a step"
                f" is spent waiting for transfers: {_longest(point.estimate)}"
            )
            return point.gpus, cause, reason
    return None, "", "every number of GPUs is worth its price"


def _longest(estimate: SpeedEstimate) -> str:
    part = max(estimate.parts, key=lambda each: each.seconds)
    return f"most of all {part.name} ({part.seconds / estimate.step_seconds:.0%})"
