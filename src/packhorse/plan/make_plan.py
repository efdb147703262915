"""Recipe + machine + prepared data -> RunPlan. Pure: allocates nothing, writes nothing, imports no torch."""

from __future__ import annotations

import math
from pathlib import Path

from packhorse.errors import UserError
from packhorse.model_spec.supported import check_model
from packhorse.plan.batch import choose_batch, settled
from packhorse.plan.command import deepspeed_config, launch_argv, worker_env
from packhorse.plan.compatibility import check_pair
from packhorse.plan.hardware import Hardware
from packhorse.plan.optimizer_pairs import check_stepping
from packhorse.plan.run_plan import DataFacts, Decision, RunPlan, Topology
from packhorse.plan.sequence import check_heads
from packhorse.plan.topology import Ask, choose_topology
from packhorse.recipe.locate import path_of
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import MODEL_FOLDER, PLAN_FILE
from packhorse.version import VERSION


def run_folder_of(recipe: Recipe) -> Path:
    """Absolute folder that the recipe's run is recorded in."""
    return (path_of(recipe.runs_folder) / recipe.name).absolute()


def make_plan(recipe: Recipe, ask: Ask, here: Hardware, data: DataFacts | None) -> RunPlan:
    """Decides the system side of a run and says why.

    Args:
        recipe: What to learn.
        ask: GPUs and nodes that the command line asks for.
        here: This machine.
        data: The prepared data; None to plan before it is prepared, when epochs cannot be turned into steps.

    Raises:
        UserError: The model cannot be trained here; the processes cannot share the batch or the heads, or the nodes
            the processes.
    """
    check_model(recipe)
    plain = settled(recipe, "cuda" if ask.gpus is not None else here.device)
    topology, processes = choose_topology(plain.parallel, ask, here)
    made = plan_on(plain, topology, processes, data)
    return made.model_copy(update={"decisions": (*made.decisions, *_settled(recipe, plain))})


def plan_on(recipe: Recipe, topology: Topology, processes: Decision, data: DataFacts | None) -> RunPlan:
    """The rest of `make_plan`, where it is decided already which processes run where.

    Args:
        recipe: What to learn.
        topology: Which processes run where.
        processes: Why.
        data: The prepared data, None before it is prepared.

    Raises:
        UserError: As `make_plan`.
    """
    check_pair(recipe, topology)
    check_heads(recipe, topology)
    batch, micro = choose_batch(recipe.batch, topology.data_ranks, topology.sequence)
    folder = run_folder_of(recipe)
    steps_per_epoch = math.ceil(data.num_packs / batch.packs_per_step) if data else None
    num_steps, steps = _count_steps(recipe, steps_per_epoch)
    check_stepping(recipe, topology, batch, num_steps)
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
        env=worker_env(topology),
        decisions=(
            processes,
            *_mesh(topology),
            micro,
            steps,
            _attention(recipe, topology.device),
            _dtype(recipe, topology.engine),
        ),
    )


def _settled(asked: Recipe, plain: Recipe) -> list[Decision]:
    """What `auto` became where there is no card to choose for."""
    reason = "auto on a CPU: one way is as fast as another, and memory is not scarce"
    values = [(name, getattr(plain.parallel, name)) for name in ("engine", "checkpointing")]
    return [
        Decision(name=f"parallel.{name}", value=str(value).lower(), reason=reason)
        for name, value in values
        if getattr(asked.parallel, name) != value
    ]


def _mesh(topology: Topology) -> list[Decision]:
    """Groups of processes, where there are any."""
    decisions = []
    if topology.shard_group is not None:
        copies = topology.world_size // topology.shard_group
        reason = (
            f"{copies} whole {'copies' if copies > 1 else 'copy'} of the weights, each on {topology.shard_group} ranks"
        )
        decisions.append(Decision(name="parallel.shard_group", value=str(topology.shard_group), reason=reason))
    if topology.sequence > 1:
        reason = f"each pack is shared by {topology.sequence} ranks; {topology.data_ranks} packs are worked on at once"
        decisions.append(Decision(name="parallel.sequence", value=str(topology.sequence), reason=reason))
    return decisions


def _base_model(recipe: Recipe) -> str | None:
    """Hub name, or absolute folder; a run folder stands for the model that it trained."""
    model = recipe.model
    if model.path is None:
        return model.id
    folder = path_of(model.path).absolute()
    trained = folder / PLAN_FILE
    if "${env:" in model.path:
        # The plan is written down; what the environment holds is not.
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


def _attention(recipe: Recipe, device: str) -> Decision:
    asked = recipe.model.attention
    if asked == "varlen" and (device == "cpu" or recipe.precision == "fp32"):
        raise UserError(
            f"model.attention is varlen, on {device} with precision {recipe.precision}.",
            "torch's varlen kernel runs on CUDA in 16 bit only.",
            "set model.attention to sdpa or auto.",
        )
    if asked != "auto":
        return Decision(name="model.attention", value=asked, reason="model.attention of the recipe")
    if device == "cuda" and recipe.precision != "fp32":
        return Decision(
            name="model.attention", value="varlen", reason="torch's varlen kernel keeps documents apart on CUDA"
        )
    return Decision(name="model.attention", value="sdpa", reason="SDPA per document: exact on any device")


def _dtype(recipe: Recipe, engine: str) -> Decision:
    asked = recipe.model.dtype
    if asked != "auto":
        return Decision(name="model.dtype", value=asked, reason="model.dtype of the recipe")
    if recipe.precision == "fp32":
        return Decision(name="model.dtype", value="float32", reason="precision is fp32")
    if recipe.method.trains_base:
        reason = f"trained weights keep fp32 masters under {recipe.precision}"
        if engine.startswith("zero"):
            reason += f"; DeepSpeed computes with {recipe.precision} copies of them"
        return Decision(name="model.dtype", value="float32", reason=reason)
    value = "bfloat16" if recipe.precision == "bf16" else "float16"
    return Decision(name="model.dtype", value=value, reason="frozen weights need no fp32 masters")
