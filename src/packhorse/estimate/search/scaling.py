"""How far a recipe scales: its plan on more and more GPUs, and what stops it.

Weak scaling keeps the work of each GPU, so a step learns from more packs; strong scaling divides the packs of the
recipe, which are the maths of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from packhorse.errors import UserError
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.speed import SpeedEstimate
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

Mode = Literal["weak", "strong"]
MemoryByScale = dict[tuple[int, int, bool], int]
"""Bytes of a GPU by number of GPUs, packs per pass, and whether a step has several passes."""

COUNTS: Final = tuple(2**power for power in range(13))
"""1 to 4,096."""
WORTHWHILE: Final = 0.5
"""Share of the first point's speed per GPU below which more GPUs are not worth their price."""


@dataclass(frozen=True)
class ScalePoint:
    """The estimate for one number of GPUs.

    Attributes:
        gpus: Number of GPUs.
        packs: Packs of a step.
        estimate: Its speed; None where the packs or the model cannot be divided by this number.
        efficiency: Tokens per second of a GPU divided by those of the first point.
        waiting: Share of the step that is spent on transfers that do not overlap with computation.
        refused: Why there is no estimate.
        required_bytes: Memory of one GPU.
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
        """Tokens per second of all GPUs together."""
        return 0.0 if self.estimate is None else self.estimate.tokens_per_second_per_gpu * self.gpus


@dataclass(frozen=True)
class Scaling:
    """A recipe over numbers of GPUs.

    Attributes:
        mode: Weak or strong scaling.
        points: Estimates for rising numbers of GPUs.
        stopped_at: First number of GPUs that is not possible or not worth its price; None if all are.
        stopped_by: `batch`, `communication` or `fixed costs`.
        reason: Explanation for the user.
    """

    mode: Mode
    points: tuple[ScalePoint, ...]
    stopped_at: int | None
    stopped_by: str
    reason: str


def scale(
    recipe: Recipe,
    basis: EstimateInputs,
    mode: Mode,
    counts: Sequence[int] = COUNTS,
    counted: MemoryByScale | None = None,
) -> Scaling:
    """Plan the recipe for each number of GPUs and find what stops it.

    Args:
        recipe: Recipe whose engine and batch are kept; weak scaling takes its packs for those of 8 GPUs.
        basis: Inputs of the estimates.
        mode: Weak or strong scaling.
        counts: Numbers of GPUs, rising.
        counted: Cache of the memory of a GPU, which another mode of the same recipe can use.
    """
    counted = {} if counted is None else counted
    points: list[ScalePoint] = []
    best = 0.0
    for count in counts:
        point = _point(recipe, basis, mode, count, counted)
        if point.estimate is not None:
            best = best or point.estimate.tokens_per_second_per_gpu
            efficiency = point.estimate.tokens_per_second_per_gpu / best
            point = replace(point, efficiency=efficiency, waiting=waiting_share(point.estimate))
        points.append(point)
    return Scaling(mode, tuple(points), *_stop(points))


def waiting_share(estimate: SpeedEstimate) -> float:
    """Return the share of a step in which GPUs wait for transfers."""
    names = {each.name for each in estimate.transfers}
    waited = sum(p.seconds for p in estimate.parts if p.name in names or p.name.startswith("waiting"))
    return waited / estimate.step_seconds


def _point(recipe: Recipe, basis: EstimateInputs, mode: Mode, count: int, counted: MemoryByScale) -> ScalePoint:
    step_packs = recipe.batch.packs if mode == "strong" else max(1, recipe.batch.packs // 8) * count
    ask = DeviceRequest(count, capability=basis.gpu.compute_capability)
    try:
        plan = make_plan(recipe.changed("batch", packs=step_packs), ask, Hardware(1, ()), None)
    except UserError as error:
        return ScalePoint(count, step_packs, None, 0.0, 0.0, error.mistakes[0].fact)
    case = PlanEstimate(plan, basis)
    # All that memory depends on as the number of GPUs and of packs changes.
    key = (count, plan.batch.micro_packs, plan.batch.accumulation_steps > 1)
    if key not in counted:
        counted[key] = case.required_bytes
    return ScalePoint(count, step_packs, case.speed, 0.0, 0.0, required_bytes=counted[key])


def _stop(points: Sequence[ScalePoint]) -> tuple[int | None, str, str]:
    most = max((point.gpus for point in points if point.estimate is not None), default=0)
    first = next((point.gpus for point in points if point.estimate is not None), 0)
    for point in points:
        # Too few GPUs for the mesh are not a limit.
        if point.estimate is None and point.gpus > most:
            return point.gpus, "batch", point.refused
        if point.estimate is not None and point.efficiency < WORTHWHILE:
            waits = point.waiting > 1 - WORTHWHILE / 2 or point.waiting > 0.3
            cause = "communication" if waits else "fixed costs"
            part = max(point.estimate.parts, key=lambda each: each.seconds)
            longest = f"the longest part is {part.name} ({part.seconds / point.estimate.step_seconds:.0%})"
            reason = (
                f"a GPU is {point.efficiency:.0%} as fast as with {first} GPUs; {point.waiting:.0%} of a step"
                f" is spent waiting for transfers: {longest}"
            )
            return point.gpus, cause, reason
    return None, "", "every number of GPUs is worth its price"
