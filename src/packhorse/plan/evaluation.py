"""The processes that measure base and tuned model of a run, and the plan by which they are launched."""

from __future__ import annotations

from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.command import deepspeed_config, launch_argv, worker_env
from packhorse.plan.run_plan import RunPlan, Topology
from packhorse.plan.topology import Hardware
from packhorse.recipe.schema import Engine

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Dtype of the base's weights -> precision in which DeepSpeed computes with them."""


def evaluation_engine(engine: Engine) -> Engine:
    """Return the engine that measures: the run's own where it shards weights; else each process has a whole model."""
    if engine in ("fsdp2", "hsdp"):
        return "fsdp2"
    return engine if engine.startswith("zero3") else "ddp"


def shards_weights(engine: Engine) -> bool:
    """Return whether each process holds a part of every weight when the model is measured."""
    return evaluation_engine(engine) != "ddp"


def evaluation_ranks(plan: RunPlan, machine: Hardware, requested: int | None = None) -> tuple[int, str]:
    """Return the number of processes that measure, and the reason.

    Args:
        plan: Plan of the run.
        machine: This machine.
        requested: `--ranks`; None for the rule: as many GPUs of this machine as the run trained on.

    Raises:
        UserError: More processes are requested than this machine has GPUs, or cores if it has no GPU.
    """
    here = len(machine.gpus)
    if requested is not None:
        most, units = (here, "GPUs") if machine.gpus else (machine.num_cores, "CPU cores")
        if not 1 <= requested <= most:
            raise UserError(
                f"--ranks is {requested}, and this machine has {most} {units}.",
                "each process that measures needs a device.",
                f"set --ranks to a number from 1 to {most}.",
            )
        return requested, "--ranks"
    if not machine.gpus:
        return 1, "this machine has no GPU, and one process uses all cores"
    if plan.topology.device == "cpu":
        return 1, "the run trained on CPUs"
    trained = plan.topology.world_size
    return min(trained, here), f"the run trained on {trained} GPUs, and {here} are here"


def evaluation_plan(plan: RunPlan, ranks: int, machine: Hardware, folder: Path) -> RunPlan:
    """Return the plan of the processes that measure: one node, the engine that shards as training did, no packs.

    Args:
        plan: Plan of the run.
        ranks: Number of processes.
        machine: This machine.
        folder: Folder of the launch, where the plan will be written.
    """
    topology = Topology(
        device=machine.device,
        engine=evaluation_engine(plan.topology.engine),
        num_nodes=1,
        processes_per_node=ranks,
        threads_per_process=max(1, machine.num_cores // ranks),
    )
    # The weights keep the dtype that one process would load them in, so that ranks measure what one process measures.
    is_zero = topology.engine.startswith("zero")
    precision = PRECISIONS[plan.chosen("model.dtype")] if is_zero else "fp32"
    recipe = plan.recipe.model_copy(update={"precision": precision})
    return plan.model_copy(
        update={
            "recipe": recipe,
            "topology": topology,
            "deepspeed": deepspeed_config(recipe, topology, plan.batch),
            "argv": launch_argv(topology, folder, "evaluate.py"),
            "env": worker_env(recipe, topology),
        }
    )
