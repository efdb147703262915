"""Where each unit of the model goes once its weights are there: whole on the device, or at once into shards.

single, ddp, zero1, zero2    whole
fsdp2, hsdp                  torch's FSDP2 (Zhao et al. 2023, arXiv 2304.11277), over all ranks or in groups
zero3                        DeepSpeed's partitioned parameters (Rajbhandari et al. 2020, arXiv 1910.02054)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from packhorse.model.load import ModelRequest
from packhorse.plan.run_plan import RunPlan, Topology

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class Placement(ABC):
    """What becomes of a unit that has just been loaded."""

    def whole_first(self, request: ModelRequest) -> ModelRequest:
        """Where a model waits that has to be whole before it is placed: on the host, where it is to be sharded."""
        # Quantised weights are far smaller, and made by kernels of the device.
        return request if request.quantization is not None else replace(request, device=torch.device("cpu"))

    @abstractmethod
    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Places modules whose weights are used together; a collective where it shards."""

    @abstractmethod
    def root(self, model: nn.Module) -> None:
        """Places what belongs to no unit, after all of them."""


class Whole(Placement):
    """Every rank holds all weights: what was loaded onto the device stays there."""

    def whole_first(self, request: ModelRequest) -> ModelRequest:
        """Where it will stay."""
        return request

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Nothing is to be done."""

    def root(self, model: nn.Module) -> None:
        """Nothing is to be done."""


class Fsdp2(Placement):
    """Each rank keeps a part of every weight, and gathers a unit while it computes."""

    def __init__(self, mesh: DeviceMesh, precision: str) -> None:
        self._mesh = mesh
        # Gradients are added up in fp32 over the ranks, as DDP does; the loss comes out in the type that made it.
        self._policy = MixedPrecisionPolicy(param_dtype=COMPUTE.get(precision), reduce_dtype=_reduced_in(precision))

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Shards a unit; the last is kept whole between forward and backward pass, which follow at once."""
        fully_shard(list(modules), mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=not is_last)

    def root(self, model: nn.Module) -> None:
        """Shards what is left, which torch keeps whole between forward and backward pass."""
        fully_shard(model, mesh=self._mesh, mp_policy=self._policy)


class Zero3(Placement):
    """Each rank keeps a part of every weight; DeepSpeed gathers a module while it computes."""

    def __init__(self, config: dict[str, Any], precision: str, device: torch.device) -> None:
        self._config = config
        self._dtype = COMPUTE.get(precision, torch.float32)
        self._device = device
        self._first: Any = None

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Partitions a unit's weights."""
        for module in modules:
            self._partition(module)

    def root(self, model: nn.Module) -> None:
        """Partitions what is left."""
        self._partition(model)

    def _partition(self, module: nn.Module) -> None:
        whole = [parameter for parameter in module.parameters() if not hasattr(parameter, "ds_id")]
        for parameter in whole:
            # DeepSpeed takes partitioned weights for converted ones; it keeps fp32 masters of what is trained.
            if parameter.dtype in CASTABLE and not hasattr(parameter, "quant_state"):
                # It also writes into them, and pages of a mapped file would then stay in memory until it is closed.
                parameter.data = parameter.data.to(self._dtype, copy=self._device.type == "cpu")
        for part in module.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer.to(self._device) if buffer is not None else None
        if not whole:
            return
        if self._first is None:
            # By name: importing DeepSpeed takes seconds that no other engine should pay.
            import_module("deepspeed").zero.Init(module=module, config_dict_or_path=self._config)
            self._first = whole[0]
        else:
            self._first.convert_to_zero_parameters(param_list=whole)


def placement_of(plan: RunPlan, device: torch.device) -> Placement:
    """The placement of the plan's engine; a collective under fsdp2 and hsdp."""
    engine = plan.topology.engine
    if engine in ("fsdp2", "hsdp"):
        return Fsdp2(make_mesh(plan.topology, device), plan.recipe.precision)
    if engine.startswith("zero3"):
        assert plan.deepspeed is not None
        return Zero3(dict(plan.deepspeed), plan.recipe.precision, device)
    return Whole()


def make_mesh(topology: Topology, device: torch.device) -> DeviceMesh:
    """All ranks in one line, or copies x shards under hsdp; a group that shards is of neighbours in rank."""
    world, group = topology.world_size, topology.shard_group
    if group is None:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // group, group), mesh_dim_names=("copy", "shard"))


def _reduced_in(precision: str) -> torch.dtype | None:
    return torch.float32 if precision in COMPUTE else None
