"""Make a plan from recipe, devices and prepared data, without torch and without writing files."""

from __future__ import annotations

import math
from pathlib import Path

from packhorse.model_spec.supported import check_model
from packhorse.plan.batch import null_packs_decision, resolve_auto, split_batch
from packhorse.plan.command import deepspeed_config, launch_argv, worker_env
from packhorse.plan.compatibility import check_heads, check_pair, check_training_settings
from packhorse.plan.compilation import compile_decision
from packhorse.plan.gpu_support import choose_attention, refuse_precision
from packhorse.plan.run_plan import BatchSplit, DataFacts, Decision, RunPlan, Topology
from packhorse.plan.teacher import check_teacher, teacher_facts
from packhorse.plan.topology import DeviceRequest, Hardware, choose_topology
from packhorse.recipe.locate import path_of
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import MODEL_FOLDER, PLAN_FILE
from packhorse.version import VERSION


def run_folder_of(recipe: Recipe) -> Path:
    """Return the absolute run folder of a recipe."""
    return (path_of(recipe.runs_folder) / recipe.name).absolute()


def make_plan(recipe: Recipe, request: DeviceRequest, machine: Hardware, data: DataFacts | None) -> RunPlan:
    """Decide the system side of a run, with a reason for each decision.

    Args:
        recipe: Recipe of the run.
        request: GPUs and nodes that the command line requests.
        machine: This machine.
        data: The prepared data; None before it is prepared, when the number of steps in an epoch is not known.

    Raises:
        UserError: The model or a combination of settings is not supported, or the heads or processes cannot be divided
            equally, or there are fewer packs than processes.
    """
    check_model(recipe)
    resolved = resolve_auto(recipe, "cuda" if request.gpus is not None else machine.device)
    topology, processes = choose_topology(resolved.parallel, request, machine)
    plan = plan_for_topology(resolved, topology, processes, data, request.capability)
    return plan.model_copy(update={"decisions": (*plan.decisions, *_auto_decisions(recipe, resolved))})


def plan_for_topology(
    recipe: Recipe,
    topology: Topology,
    processes: Decision,
    data: DataFacts | None,
    capability: float | None = None,
) -> RunPlan:
    """Make a plan for processes that are already placed.

    Args:
        recipe: Recipe of the run, without `auto` in `parallel`.
        topology: Placement of the processes.
        processes: Decision with the reason for the placement.
        data: The prepared data; None before it is prepared.
        capability: Compute capability of the GPUs; None where it is not known.

    Raises:
        UserError: A combination of settings is not supported, heads cannot be divided equally, or there are fewer packs
            than processes.
    """
    check_pair(recipe, topology)
    check_heads(recipe, topology)
    check_teacher(recipe, topology)
    refuse_precision(recipe, capability)
    batch, micro = split_batch(recipe.batch, topology.data_ranks, topology.sequence)
    folder = run_folder_of(recipe)
    steps_per_epoch = math.ceil(data.num_packs / batch.packs_per_step) if data else None
    num_steps, steps = _count_steps(recipe, steps_per_epoch)
    if data and data.num_packs < batch.packs_per_step:
        larger = f"a step is larger than an epoch: {batch.packs_per_step} packs, and the data has {data.num_packs}"
        steps = steps.model_copy(update={"reason": f"{steps.reason}; {larger}"})
    check_training_settings(recipe, topology, batch, num_steps)
    attention = choose_attention(recipe, topology.device, capability)
    return RunPlan(
        packhorse_version=VERSION,
        recipe=recipe,
        run_folder=str(folder),
        base_model=_base_model(recipe),
        topology=topology,
        batch=batch,
        data=data,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        deepspeed=deepspeed_config(recipe, topology, batch),
        argv=launch_argv(topology, folder),
        env=worker_env(recipe, topology),
        teacher=teacher_facts(recipe),
        decisions=(
            processes,
            *_mesh(topology),
            micro,
            *_null_packs(batch, topology),
            steps,
            *_units(recipe, data),
            attention,
            _dtype(recipe, topology.engine),
            *compile_decision(recipe, topology, attention.value),
        ),
    )


def _auto_decisions(recipe: Recipe, resolved: Recipe) -> list[Decision]:
    reason = "auto on a CPU: all engines are equally fast, and memory is plentiful"
    values = [(name, getattr(resolved.parallel, name)) for name in ("engine", "checkpointing")]
    return [
        Decision(name=f"parallel.{name}", value=str(value).lower(), reason=reason)
        for name, value in values
        if getattr(recipe.parallel, name) != value
    ]


def _mesh(topology: Topology) -> list[Decision]:
    decisions = []
    if topology.shard_group is not None:
        copies = topology.world_size // topology.shard_group
        reason = f"each copy of the weights is sharded over {topology.shard_group} ranks; number of copies: {copies}"
        decisions.append(Decision(name="parallel.shard_group", value=str(topology.shard_group), reason=reason))
    if topology.sequence > 1:
        reason = f"{topology.sequence} ranks share each pack; {topology.data_ranks} packs are processed at once"
        decisions.append(Decision(name="parallel.sequence", value=str(topology.sequence), reason=reason))
    return decisions


def _null_packs(batch: BatchSplit, topology: Topology) -> list[Decision]:
    decision = null_packs_decision(batch, topology.data_ranks, topology.sequence)
    return [decision] if decision else []


def _units(recipe: Recipe, data: DataFacts | None) -> list[Decision]:
    if data is None or data.units_per_step is None:
        return []
    mean, least, most = data.units_per_step
    reason = f"{recipe.objective.unit}s on average, {least:,} to {most:,}; each weighs the same in an epoch"
    return [Decision(name="units per step", value=f"{mean:.3g}", reason=reason)]


def _base_model(recipe: Recipe) -> str | None:
    """Return the hub name or absolute folder of the weights; a run folder means the model that it trained."""
    model = recipe.model
    if model.path is None:
        return model.id
    folder = path_of(model.path).absolute()
    trained = folder / PLAN_FILE
    if "${env:" in model.path:
        # Values of the environment are never written to the plan.
        return f"{model.path}/model" if trained.is_file() else model.path
    return str(folder / MODEL_FOLDER if trained.is_file() else folder)


def _count_steps(recipe: Recipe, steps_per_epoch: int | None) -> tuple[int | None, Decision]:
    if recipe.steps is not None:
        return recipe.steps, Decision(name="steps", value=str(recipe.steps), reason="steps of the recipe")
    epochs = recipe.epochs or 1
    if steps_per_epoch is None:
        reason = f"{epochs} epochs; `packhorse prepare` counts the packs"
        return None, Decision(name="steps", value="unknown", reason=reason)
    reason = f"{epochs} epochs of {steps_per_epoch} steps"
    return epochs * steps_per_epoch, Decision(name="steps", value=str(epochs * steps_per_epoch), reason=reason)


def _dtype(recipe: Recipe, engine: str) -> Decision:
    dtype = recipe.model.dtype
    if dtype != "auto":
        return Decision(name="model.dtype", value=dtype, reason="model.dtype of the recipe")
    if recipe.precision == "fp32":
        return Decision(name="model.dtype", value="float32", reason="precision is fp32")
    if recipe.method.trains_base:
        reason = f"trained weights keep fp32 masters under {recipe.precision}"
        if engine.startswith("zero"):
            reason += f"; DeepSpeed computes with {recipe.precision} copies of them"
        return Decision(name="model.dtype", value="float32", reason=reason)
    value = "bfloat16" if recipe.precision == "bf16" else "float16"
    return Decision(name="model.dtype", value=value, reason="frozen weights need no fp32 masters")
