"""A plan on one kind of GPU: its memory, storage and speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Final

from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.memory import MemoryEstimate, estimate_memory
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.speed import SpeedEstimate, estimate_speed, scaled
from packhorse.estimate.storage import StorageEstimate, estimate_storage
from packhorse.estimate.teacher import TeacherEstimate, estimate_teacher, memory_with, speed_with
from packhorse.estimate.weights import WeightTensor, list_weights
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import Prediction, RunPlan

if TYPE_CHECKING:
    # A plan of prepared data needs neither tokenizers nor pyarrow.
    from packhorse.data.estimate_packs import PackEstimate

MARGIN: Final = 0.10
"""Share of the card that an automatic choice leaves free, because some parts are assumed."""


@dataclass(frozen=True)
class SpeedCorrection:
    """Correction of the predicted speed by a measured run.

    Attributes:
        factor: Ratio of measured to predicted seconds of a step.
        source: The measured run.
    """

    factor: float
    source: str


@dataclass(frozen=True)
class EstimateInputs:
    """Inputs of an estimate, other than the plan.

    Attributes:
        shape: Shape of the model.
        packs: Training packs.
        gpu: Kind of GPU.
        validation: Validation packs; None takes `packs`.
        network_gb: GB/s of one GPU between nodes; None takes the profile's.
        price_per_gpu_hour: Price in any currency.
        measured: Correction of the speed by a measured run.
        guessed: Approximate number of packs, before they are prepared.
        host_bytes: Memory of a node; None where the GPUs are not this machine's.
        teacher: Shape of the teacher of a distillation; None for other objectives, or where it is not known.
    """

    shape: Shape
    packs: PackFigures
    gpu: GpuProfile
    validation: PackFigures | None = None
    network_gb: float | None = None
    price_per_gpu_hour: float | None = None
    measured: SpeedCorrection | None = None
    guessed: PackEstimate | None = None
    host_bytes: int | None = None
    teacher: Shape | None = None


@dataclass(frozen=True)
class PlanEstimate:
    """A plan on one kind of GPU; each estimate is computed at its first use."""

    plan: RunPlan
    basis: EstimateInputs

    @cached_property
    def weights(self) -> tuple[WeightTensor, ...] | None:
        """Weights of the run, which all estimates share; None where peft alone decides what is trained."""
        return list_weights(self.plan, self.basis.shape)

    @property
    def _known_weights(self) -> tuple[WeightTensor, ...]:
        assert self.weights is not None, "estimate_plan checks that the weights are known"
        return self.weights

    @cached_property
    def teacher(self) -> TeacherEstimate | None:
        """Teacher of a distillation; None for other objectives, or where its shape is not known."""
        basis = self.basis
        if basis.teacher is None:
            return None
        return estimate_teacher(self.plan, basis.teacher, basis.packs, basis.gpu, basis.network_gb)

    @cached_property
    def memory(self) -> MemoryEstimate:
        """Memory of one GPU."""
        basis = self.basis
        memory = estimate_memory(self.plan, basis.shape, self._known_weights, basis.packs, basis.validation)
        return memory if self.teacher is None else memory_with(memory, self.teacher, self.plan, basis.shape)

    @cached_property
    def storage(self) -> StorageEstimate:
        """Host memory and disk space."""
        return estimate_storage(self.plan, self.basis.shape, self._known_weights, self.basis.packs)

    @cached_property
    def speed(self) -> SpeedEstimate:
        """Speed of the run."""
        basis, measured = self.basis, self.basis.measured
        gpu = (basis.gpu, basis.network_gb, basis.price_per_gpu_hour)
        speed = estimate_speed(self.plan, basis.shape, self._known_weights, basis.packs, *gpu)
        speed = replace(speed, num_steps=self.num_steps, before_seconds=self._reference_seconds(speed))
        speed = speed if self.teacher is None else speed_with(speed, self.teacher, self.plan)
        return speed if measured is None else scaled(speed, measured.factor, measured.source)

    def _reference_seconds(self, speed: SpeedEstimate) -> float:
        """Return the time of the reference model's forward passes over the data, before the first step."""
        objective, packs = self.plan.recipe.objective, self.basis.packs.num_packs
        if not objective.needs_reference or packs is None:
            return 0.0
        held_out = (self.basis.validation.num_packs or 0) if self.basis.validation is not None else 0
        at_once = self.plan.topology.data_ranks * self.plan.batch.micro_packs
        return (ceil(packs / at_once) + ceil(held_out / at_once)) * speed.forward_seconds

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; a guess where neither the recipe nor prepared packs determine them."""
        plan, guessed = self.plan, self.basis.guessed
        if plan.num_steps is not None or guessed is None:
            return plan.num_steps
        return (plan.recipe.epochs or 1) * ceil(guessed.num_packs / plan.batch.packs_per_step)

    @property
    def required_bytes(self) -> int:
        """Memory that one GPU needs."""
        return self.memory.required_bytes

    @property
    def margin(self) -> float:
        """Share of the card that stays free; below 0 where the run does not fit."""
        return 1 - self.required_bytes / self.basis.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether the card is large enough, and the host where its memory is known."""
        return self.margin >= 0 and self.host_fits

    @property
    def is_comfortable(self) -> bool:
        """Whether it fits with `MARGIN` of the card to spare."""
        return self.margin >= MARGIN and self.host_fits

    @property
    def host_fits(self) -> bool:
        """Whether a node's memory is large enough, as far as Packhorse knows it."""
        return self.basis.host_bytes is None or self.storage.host_bytes <= self.basis.host_bytes

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return self.speed.step_seconds

    def on(self, gpu: GpuProfile) -> PlanEstimate:
        """Return the estimate for another kind of GPU, in other nodes; the memory is not counted again."""
        host = self.basis.host_bytes if gpu == self.basis.gpu else None
        other = PlanEstimate(self.plan, replace(self.basis, gpu=gpu, host_bytes=host))
        other.__dict__.update(weights=self.weights, memory=self.memory)  # as `cached_property` stores them
        return other

    def predicted_plan(self) -> RunPlan:
        """Return the plan with its predicted memory and time."""
        predicted = Prediction(
            gpu=self.basis.gpu.name,
            memory_bytes=self.basis.gpu.memory_bytes,
            required_bytes=self.required_bytes,
            phase=self.memory.peak.name,
            step_seconds=self.step_seconds,
            flops=self.speed.flop_counts,
        )
        return self.plan.model_copy(update={"predicted": predicted})


def estimate_plan(plan: RunPlan, basis: EstimateInputs) -> PlanEstimate | None:
    """Return the plan's estimate; None where peft alone decides what the method trains."""
    estimate = PlanEstimate(plan, basis)
    return None if estimate.weights is None else estimate
