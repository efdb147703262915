"""What the teacher of a distillation costs: memory in a separate phase or beside the student, time, disk space."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from packhorse.data.data_manifest import read_data_manifest
from packhorse.data.packs.top_tokens import BLOCK_PACKS, num_bytes_of
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.memory import MemoryEstimate, Phase, estimate_memory
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.speed import SpeedEstimate, TimePart, estimate_speed
from packhorse.estimate.training_state import FP32, Component
from packhorse.estimate.weights import compute_width, list_weights
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.teacher import teacher_plan
from packhorse.recipe.objectives import DistilObjective

CHUNK_TOKENS = 256
"""Rows of logits that exist at once; a test compares it with `train/objectives/divergence.py`."""
CHUNK_COPIES = 6
"""Tensors of these rows in float32: logits, log-probabilities and products of both models."""


@dataclass(frozen=True)
class TeacherEstimate:
    """Cost of a teacher.

    Attributes:
        is_resident: Whether it runs beside the student in every step; otherwise once, before training.
        memory: Memory of its forward pass on one GPU.
        pass_seconds: Seconds of one forward pass of a rank.
        num_passes: Passes of a rank before training; 0 for a resident teacher, None where the packs are not counted.
    """

    is_resident: bool
    memory: Phase
    pass_seconds: float
    num_passes: int | None

    @property
    def bytes_beside_student(self) -> int:
        """Memory that a resident teacher keeps while the student trains."""
        return sum(part.bytes for part in self.memory.components if part.name in ("weights", "gathered weights"))


def estimate_teacher(
    plan: RunPlan, shape: Shape, packs: PackFigures, gpu: GpuProfile, network_gb: float | None
) -> TeacherEstimate | None:
    """Return the cost of the plan's teacher; None where only peft knows its weights.

    Args:
        plan: Plan of a distillation.
        shape: Shape of the teacher.
        packs: Training packs.
        gpu: Kind of GPU.
        network_gb: GB/s of one GPU between nodes; None takes the profile's.
    """
    section = plan.recipe.objective
    assert isinstance(section, DistilObjective)
    alone = _alone(plan)
    listed = list_weights(alone, shape)
    if listed is None:
        return None
    weights = tuple(replace(weight, trained=False, width=compute_width(plan)) for weight in listed)
    phase = estimate_memory(alone, shape, weights, packs).phase("evaluation")
    speed = estimate_speed(alone, shape, weights, packs, gpu, network_gb)
    is_resident = section.top == "all"
    passes = None if packs.num_packs is None else 0 if is_resident else _num_passes(plan, packs.num_packs)
    return TeacherEstimate(is_resident, replace(phase, name="teacher"), speed.forward_seconds, passes)


def _num_passes(plan: RunPlan, num_packs: int) -> int:
    """Return the forward passes of a rank before training: each rank takes whole blocks of packs."""
    blocks = ceil(ceil(num_packs / BLOCK_PACKS) / plan.topology.world_size)
    return blocks * ceil(BLOCK_PACKS / plan.batch.micro_packs)


def _alone(plan: RunPlan) -> RunPlan:
    """Return the plan of the teacher's forward passes: sharded by FSDP2 under ZeRO-3, whole under other DeepSpeed."""
    engine = plan.topology.engine
    if engine.startswith("zero"):
        engine = "fsdp2" if engine.startswith("zero3") else "ddp"
    topology = plan.topology.model_copy(update={"engine": engine, "sequence": 1})
    return teacher_plan(plan).model_copy(update={"topology": topology, "deepspeed": None})


def memory_with(memory: MemoryEstimate, teacher: TeacherEstimate, plan: RunPlan, shape: Shape) -> MemoryEstimate:
    """Return the student's memory with that of its teacher, in a phase before loading or in every phase."""
    chunk = CHUNK_COPIES * CHUNK_TOKENS * shape.vocabulary * FP32
    reason = f"{CHUNK_COPIES} tensors of {CHUNK_TOKENS} rows of logits in float32, of both models"
    head = plan.recipe.method.trains_base * shape.vocabulary * shape.hidden * FP32
    logits = Component("logits", chunk + head, reason + ", and the gradient of a trained head" * (head > 0))
    phases = tuple(
        replace(phase, components=(*(part for part in phase.components if part.name != "logits"), logits))
        if phase.name == "loss"
        else phase
        for phase in memory.phases
    )
    if not teacher.is_resident:
        return replace(memory, phases=(teacher.memory, *phases))
    beside = Component("teacher", teacher.bytes_beside_student, f"its frozen weights, {plan.topology.engine}")
    return replace(memory, phases=tuple(replace(each, components=(*each.components, beside)) for each in phases))


def speed_with(speed: SpeedEstimate, teacher: TeacherEstimate, plan: RunPlan) -> SpeedEstimate:
    """Return the student's speed with the teacher's forward passes: in every step, or once before training."""
    if teacher.is_resident:
        seconds = teacher.pass_seconds * plan.batch.accumulation_steps
        part = TimePart("teacher", seconds, "its forward pass for each micro-batch")
        return replace(speed, parts=(*speed.parts, part))
    return replace(speed, before_seconds=(teacher.num_passes or 0) * teacher.pass_seconds)


def stored_bytes(plan: RunPlan) -> int:
    """Return the disk space of the teacher's stored tokens; 0 where none are stored, or the data is not prepared."""
    section = plan.recipe.objective
    if not isinstance(section, DistilObjective) or section.top == "all" or plan.data is None:
        return 0
    manifest = read_data_manifest(Path(plan.data.folder))
    vocab_size = manifest.vocab_size if manifest is not None else 1 << 16
    return num_bytes_of(plan.data.num_supervised_tokens, min(section.top, vocab_size), vocab_size)
