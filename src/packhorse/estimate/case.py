"""A plan and what it costs on one kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Final, TypeVar

from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.held import held_weights
from packhorse.estimate.memory import MemoryEstimate, estimate_memory
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.speed import SpeedEstimate, estimate_speed, scaled
from packhorse.estimate.storage import StorageEstimate, estimate_storage
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import Prediction, RunPlan

T = TypeVar("T")
MARGIN: Final = 0.10
"""Share of the card that an automatic choice leaves free: what is assumed may be more."""


@dataclass(frozen=True)
class Measured:
    """What a run took.

    Attributes:
        factor: Measured over predicted seconds of its step.
        source: Which run.
    """

    factor: float
    source: str


@dataclass(frozen=True)
class Guessed:
    """Packs that nobody has counted yet.

    Attributes:
        num_packs: About.
        reason: From what.
    """

    num_packs: int
    reason: str


@dataclass(frozen=True)
class Basis:
    """What an estimate needs beside the plan.

    Attributes:
        shape: Of the model.
        packs: That are trained on.
        gpu: Of which kind.
        validation: That are evaluated on; None: like those.
        network_gb: GB/s of one GPU between nodes; None takes the profile's.
        price_per_gpu_hour: In any currency.
        measured: Corrects the speed.
        guessed: How many packs there will about be, before they are prepared.
        host_bytes: Memory of a node; None where the GPUs are not this machine's.
    """

    shape: Shape
    packs: PackFigures
    gpu: GpuProfile
    validation: PackFigures | None = None
    network_gb: float | None = None
    price_per_gpu_hour: float | None = None
    measured: Measured | None = None
    guessed: Guessed | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """A plan on a kind of GPU; each estimate is made when it is first asked for."""

    plan: RunPlan
    basis: Basis

    @cached_property
    def memory(self) -> MemoryEstimate:
        """Of one GPU."""
        basis = self.basis
        return _there(estimate_memory(self.plan, basis.shape, basis.packs, basis.validation))

    @cached_property
    def storage(self) -> StorageEstimate:
        """Host memory and disk."""
        return _there(estimate_storage(self.plan, self.basis.shape, self.basis.packs))

    @cached_property
    def speed(self) -> SpeedEstimate:
        """Of the run."""
        basis = self.basis
        price, measured = basis.price_per_gpu_hour, basis.measured
        speed = _there(estimate_speed(self.plan, basis.shape, basis.packs, basis.gpu, basis.network_gb, price))
        speed = replace(speed, num_steps=self.num_steps)
        return speed if measured is None else scaled(speed, measured.factor, measured.source)

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; guessed where neither the recipe nor the packs on disk say them."""
        plan, guessed = self.plan, self.basis.guessed
        if plan.num_steps is not None or guessed is None:
            return plan.num_steps
        return (plan.recipe.epochs or 1) * ceil(guessed.num_packs / plan.batch.packs_per_step)

    @property
    def required_bytes(self) -> int:
        """Of one GPU."""
        return self.memory.required_bytes

    @property
    def margin(self) -> float:
        """Share of the card that stays free; below 0 where the run does not fit."""
        return 1 - self.required_bytes / self.basis.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether the card holds it, and the host where its memory is known."""
        return self.margin >= 0 and self.host_fits

    @property
    def is_comfortable(self) -> bool:
        """Whether it fits with `MARGIN` of the card to spare."""
        return self.margin >= MARGIN and self.host_fits

    @property
    def host_fits(self) -> bool:
        """Whether a node's memory holds what is kept there, as far as it is known."""
        return self.basis.host_bytes is None or self.storage.host_bytes <= self.basis.host_bytes

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return self.speed.step_seconds

    def on(self, gpu: GpuProfile) -> Case:
        """The same plan on another kind of GPU, in other nodes; what it needs there is not counted again."""
        host = self.basis.host_bytes if gpu == self.basis.gpu else None
        other = Case(self.plan, replace(self.basis, gpu=gpu, host_bytes=host))
        other.__dict__["memory"] = self.memory
        return other

    def noted(self) -> RunPlan:
        """The plan with what is predicted of it."""
        predicted = Prediction(
            gpu=self.basis.gpu.name,
            memory_bytes=self.basis.gpu.memory_bytes,
            required_bytes=self.required_bytes,
            phase=self.memory.peak.name,
            step_seconds=self.step_seconds,
        )
        return self.plan.model_copy(update={"predicted": predicted})


def case_of(plan: RunPlan, basis: Basis) -> Case | None:
    """The plan on that GPU; None where only the library knows what the method trains."""
    return None if held_weights(plan, basis.shape) is None else Case(plan, basis)


def _there(estimate: T | None) -> T:
    assert estimate is not None, "case_of asks whether the weights are known"
    return estimate
