"""Proof that what runs is what was planned: processes, engine, stage, offload, mesh, precision.

A launch that looks right can take another engine without a word, and then shards nothing.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan, Topology
from packhorse.train.ranks.identity import world_size


def assert_launched_as_planned(accelerator: Accelerator, plan: RunPlan) -> None:
    """Compares the processes that were started with the plan, before a model is loaded.

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
        raise _another(topology, f"Accelerate started {runs}")
    if family == "fsdp" and not accelerator.is_fsdp2:
        raise _another(topology, "Accelerate started FSDP of version 1")


def assert_sharded_as_planned(model: Any, plan: RunPlan) -> None:  # noqa: ANN401
    """Looks at the model that will train.

    Raises:
        UserError: Stage, offload, mesh or precision differ, or something is not sharded that should be.
    """
    if plan.deepspeed is not None:
        _compare(plan.topology, _of_deepspeed_config(plan.deepspeed), _of_deepspeed_engine(model))
    elif plan.topology.engine in ("fsdp2", "hsdp"):
        _compare(
            plan.topology, {"mesh of the weights": [_mesh(plan.topology)]}, {"mesh of the weights": _meshes(model)}
        )
    else:
        runs = "DistributedDataParallel" if isinstance(model, DistributedDataParallel) else "bare model"
        # One process has nobody to share gradients with: accelerate wraps its model or not.
        wanted = "DistributedDataParallel" if plan.topology.world_size > 1 else runs
        _compare(plan.topology, {"model": wanted}, {"model": runs})


def _family(topology: Topology) -> str:
    if topology.engine in ("fsdp2", "hsdp"):
        return "fsdp"
    return "deepspeed" if topology.engine.startswith("zero") else "ddp"


def _of_deepspeed_config(config: dict[str, Any]) -> dict[str, Any]:
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


def _of_deepspeed_engine(engine: Any) -> dict[str, Any]:  # noqa: ANN401
    def device(offload: Any) -> str:  # noqa: ANN401
        # Its configuration holds a plain string or an enumeration, by how it was read.
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
    """(shards,) under fsdp2; (copies, shards) under hsdp."""
    if topology.shard_group is None:
        return (topology.world_size,)
    return (topology.world_size // topology.shard_group, topology.shard_group)


def _meshes(model: nn.Module) -> list[tuple[int, ...]]:
    """Each shape of mesh that parameters lie on; () for those that every rank holds whole."""
    shapes = {
        tuple(parameter.device_mesh.shape) if isinstance(parameter, DTensor) else () for parameter in model.parameters()
    }
    return sorted(shapes)


def _compare(topology: Topology, wanted: dict[str, Any], runs: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if runs[name] != value:
            raise _another(topology, f"{name} should be {value} and is {runs[name]}")


def _another(topology: Topology, difference: str) -> UserError:
    return UserError(
        f"the plan's engine is {topology.engine}, and {difference}.",
        "another engine, stage or mesh holds other memory than planned, and may train otherwise.",
        f"launch with --config_file accelerate_configs/{topology.engine}.yaml, or use `packhorse train`.",
    )
