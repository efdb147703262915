"""Proof that the launch matches the plan: processes, engine, ZeRO stage, offload, mesh, precision.

A launch that looks right can silently use another engine, and then shards nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan, Topology
from packhorse.train.engine.process_group import world_size

AMPERE = (8, 0)


def assert_device_as_planned(plan: RunPlan) -> None:
    """Compare this machine's GPU with the plan, before Accelerate starts: it would silently train on the CPU.

    Raises:
        UserError: torch finds no GPU, or the GPU lacks what the plan's kernel or precision needs.
    """
    if plan.topology.device == "cpu":
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"the plan is for GPUs, and torch {torch.__version__} finds none here.",
            f"this torch is {built}; a container without --nv or --gpus, a driver older than that CUDA, or an empty "
            "CUDA_VISIBLE_DEVICES also hides GPUs.",
            "run `nvidia-smi` and `python -c 'import torch; print(torch.version.cuda, torch.cuda.is_available())'` "
            "here; install the build of torch for your driver's CUDA.",
        )
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if (major, minor) >= AMPERE:
        return
    gpu = f"{name} has compute capability {major}.{minor}"
    if plan.chosen("model.attention") == "varlen":
        raise UserError(
            f"model.attention is varlen, and {gpu}.",
            "torch's varlen kernel is FlashAttention-2, which needs 8.0 (Ampere) or newer.",
            "train again with model.attention=sdpa.",
        )
    if plan.recipe.precision == "bf16":
        raise UserError(
            f"precision is bf16, and {gpu}.",
            "GPUs before 8.0 (Ampere) have no bf16 units, and torch emulates them slowly.",
            "train again with precision=fp16, or fp32.",
        )


def assert_launched_as_planned(accelerator: Accelerator, plan: RunPlan) -> None:
    """Compare the started processes with the plan, before a model is loaded.

    Raises:
        UserError: World size or kind of engine differ.
    """
    topology = plan.topology
    world = world_size()
    if world != topology.world_size:
        raise UserError(
            f"the plan is for {topology.world_size} processes and {world} were started.",
            "each process trains on its share of the packs; with another number some would be used twice or never.",
            f"add --num_processes {topology.world_size} to accelerate launch, or use `packhorse train`, which does.",
        )
    runs = str(accelerator.distributed_type.value).lower()
    family = "deepspeed" if "deepspeed" in runs else "fsdp" if "fsdp" in runs else "ddp"
    if family != _family(topology):
        raise _other_engine(topology, f"Accelerate started {runs}")
    if family == "fsdp" and not accelerator.is_fsdp2:
        raise _other_engine(topology, "Accelerate started FSDP of version 1")


def assert_sharded_as_planned(model: Any, plan: RunPlan) -> None:  # noqa: ANN401
    """Compare the model that will train with the plan.

    Raises:
        UserError: ZeRO stage, offload, mesh or precision differ, or something is not sharded that should be.
    """
    topology = plan.topology
    if plan.deepspeed is not None:
        _compare(topology, _planned_deepspeed(plan.deepspeed), _running_deepspeed(model))
    elif topology.engine in ("fsdp2", "hsdp"):
        _compare(topology, {"mesh of the weights": [_mesh(topology)]}, {"mesh of the weights": _meshes(model)})
    else:
        runs = "DistributedDataParallel" if isinstance(model, DistributedDataParallel) else "bare model"
        # With one process there is nothing to exchange, and accelerate may wrap the model or not.
        planned = "DistributedDataParallel" if topology.world_size > 1 else runs
        _compare(topology, {"model": planned}, {"model": runs})


def _family(topology: Topology) -> str:
    if topology.engine in ("fsdp2", "hsdp"):
        return "fsdp"
    return "deepspeed" if topology.engine.startswith("zero") else "ddp"


def _planned_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    zero = config["zero_optimization"]
    return {
        "ZeRO stage": zero["stage"],
        "optimizer states in": zero.get("offload_optimizer", {}).get("device", "none"),
        "weights in": zero.get("offload_param", {}).get("device", "none"),
        "bf16": config["bf16"]["enabled"],
        "fp16": config["fp16"]["enabled"],
        "accumulation": config["gradient_accumulation_steps"],
        "clipping": config["gradient_clipping"],
    }


def _running_deepspeed(engine: Any) -> dict[str, Any]:  # noqa: ANN401
    def device(offload: Any) -> str:  # noqa: ANN401
        # DeepSpeed holds a plain string or an enumeration, depending on how the configuration was read.
        return "none" if offload is None else str(getattr(offload.device, "value", offload.device))

    return {
        "ZeRO stage": engine.zero_optimization_stage(),
        "optimizer states in": device(engine.zero_offload_optimizer()),
        "weights in": device(engine.zero_offload_param()),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "accumulation": engine.gradient_accumulation_steps(),
        "clipping": engine.gradient_clipping(),
    }


def _mesh(topology: Topology) -> tuple[int, ...]:
    """Return the planned mesh: (shards,) under fsdp2; (copies, shards) under hsdp."""
    if topology.shard_group is None:
        return (topology.world_size,)
    return (topology.world_size // topology.shard_group, topology.shard_group)


def _meshes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return each mesh shape among the parameters; () for those that every rank holds whole."""
    shapes = {
        tuple(parameter.device_mesh.shape) if isinstance(parameter, DTensor) else () for parameter in model.parameters()
    }
    return sorted(shapes)


def _compare(topology: Topology, planned: dict[str, Any], runs: dict[str, Any]) -> None:
    for name, value in planned.items():
        if runs[name] != value:
            raise _other_engine(topology, f"{name} should be {value} and is {runs[name]}")


def _other_engine(topology: Topology, difference: str) -> UserError:
    return UserError(
        f"the plan's engine is {topology.engine}, and {difference}.",
        "another engine, stage or mesh needs a different amount of memory than planned, and may train differently.",
        f"launch with --config_file accelerate_configs/{topology.engine}.yaml, or use `packhorse train`.",
    )
