"""Recipe + machine + prepared data -> RunPlan. Pure: allocates nothing, writes nothing, imports no torch."""

from __future__ import annotations

import math
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.choose import choose_batch
from packhorse.plan.command import deepspeed_config, launch_argv, worker_env
from packhorse.plan.hardware import Hardware
from packhorse.plan.run_plan import PLAN_FILE, DataFacts, Decision, RunPlan
from packhorse.plan.topology import Ask, choose_topology
from packhorse.recipe.locate import expand
from packhorse.recipe.schema import Recipe
from packhorse.version import VERSION


def run_folder_of(recipe: Recipe) -> Path:
    """Absolute folder that the recipe's run is recorded in."""
    return (Path(expand(recipe.runs_folder)).expanduser() / recipe.name).absolute()


def make_plan(recipe: Recipe, ask: Ask, here: Hardware, data: DataFacts | None) -> RunPlan:
    """Decides the system side of a run and says why.

    Args:
        recipe: What to learn.
        ask: GPUs and nodes that the command line asks for.
        here: This machine.
        data: The prepared data; None to plan before it is prepared, when epochs cannot be turned into steps.

    Raises:
        UserError: The processes cannot share the batch, or the nodes the processes.
    """
    topology, processes = choose_topology(recipe.parallel, ask, here)
    batch, micro = choose_batch(recipe.batch, topology.data_ranks)
    folder = run_folder_of(recipe)
    steps_per_epoch = math.ceil(data.num_packs / batch.packs_per_step) if data else None
    num_steps, steps = _count_steps(recipe, steps_per_epoch)
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
        decisions=(processes, micro, steps, _attention(recipe, topology.device), _dtype(recipe)),
    )


def _base_model(recipe: Recipe) -> str | None:
    """Hub name, or absolute folder; a run folder stands for the model that it trained."""
    model = recipe.model
    if model.path is None:
        return model.id
    folder = Path(expand(model.path)).expanduser().absolute()
    trained = folder / PLAN_FILE
    if "${env:" in model.path:
        # The plan is written down; what the environment holds is not.
        return f"{model.path}/model" if trained.is_file() else model.path
    return str(folder / "model" if trained.is_file() else folder)


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
    if device == "cuda" and recipe.precision == "bf16":
        return Decision(
            name="model.attention", value="varlen", reason="torch's varlen kernel keeps documents apart on CUDA"
        )
    return Decision(name="model.attention", value="sdpa", reason="SDPA per document: exact on any device")


def _dtype(recipe: Recipe) -> Decision:
    asked = recipe.model.dtype
    if asked != "auto":
        return Decision(name="model.dtype", value=asked, reason="model.dtype of the recipe")
    if recipe.precision == "fp32":
        return Decision(name="model.dtype", value="float32", reason="precision is fp32")
    if recipe.method.trains_base:
        return Decision(name="model.dtype", value="float32", reason="trained weights keep fp32 masters under bf16")
    return Decision(name="model.dtype", value="bfloat16", reason="frozen weights need no fp32 masters")
