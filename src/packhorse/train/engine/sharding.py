"""Places each unit of the model once its weights are loaded: whole on the device, or immediately into shards.

single, ddp, zero1, zero2    whole
fsdp2, hsdp                  torch's FSDP2 (Zhao et al. 2023, arXiv 2304.11277), over all ranks or in groups
zero3                        DeepSpeed's partitioned parameters (Rajbhandari et al. 2020, arXiv 1910.02054)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from packhorse.model.load import ModelRequest
from packhorse.model.sharded import chunk_of, is_partitioned
from packhorse.model.streaming import KeptRows
from packhorse.plan.run_plan import RunPlan, Topology
from packhorse.train.engine.precision import COMPUTE_DTYPES
from packhorse.train.engine.process_group import own_rank

CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class Placement:
    """Leaves each unit where it was loaded: whole, on the device of every rank. Subclasses shard it."""

    shards = False

    def whole_first(self, request: ModelRequest) -> ModelRequest:
        """Return the request for a model that is loaded whole: it waits on the host if it is sharded afterwards."""
        # Quantised weights are far smaller, and made by kernels of the device.
        on_device = not self.shards or request.quantization is not None
        return request if on_device else replace(request, device=torch.device("cpu"))

    @property
    def kept_rows(self) -> KeptRows | None:
        """Which rows of a weight this rank must have read before `unit` shards it; None for all."""
        return None

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Place modules whose weights are used together; a collective where it shards."""

    def root(self, model: nn.Module) -> None:
        """Place what belongs to no unit; called after all units."""


class Fsdp2(Placement):
    """Each rank keeps a part of every weight, and gathers a unit while it computes."""

    shards = True

    def __init__(self, mesh: DeviceMesh, precision: str) -> None:
        self._mesh = mesh
        is_mixed = precision != "fp32"
        # Gradients are summed in fp32 over the ranks, as DDP does; the loss keeps the dtype that it was computed in.
        self._policy = MixedPrecisionPolicy(
            param_dtype=COMPUTE_DTYPES[precision] if is_mixed else None,
            reduce_dtype=torch.float32 if is_mixed else None,
        )

    @property
    def kept_rows(self) -> KeptRows:
        """This rank's shard, by rows."""
        rank, num_ranks = self._mesh.get_local_rank(self._mesh.ndim - 1), self._mesh.size(self._mesh.ndim - 1)
        return lambda _, shape: chunk_of(shape[0], rank, num_ranks)

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Shard a unit; the last one stays whole between forward and backward pass, which follow immediately."""
        fully_shard(list(modules), mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=not is_last)

    def root(self, model: nn.Module) -> None:
        """Shard the rest, which torch keeps whole between forward and backward pass."""
        fully_shard(model, mesh=self._mesh, mp_policy=self._policy)


class Zero3(Placement):
    """Each rank keeps a part of every weight; DeepSpeed gathers a module while it computes."""

    shards = True

    def __init__(self, config: dict[str, Any], precision: str, device: torch.device) -> None:
        self._config = config
        self._dtype = COMPUTE_DTYPES[precision]
        self._device = device
        self._first: Any = None

    @property
    def kept_rows(self) -> KeptRows:
        """Everything on rank 0, which sends each weight to the others when DeepSpeed partitions it."""
        is_main = own_rank() == 0
        return lambda _, shape: slice(0, shape[0] if is_main else 0)

    def unit(self, modules: Sequence[nn.Module], is_last: bool) -> None:
        """Partition a unit's weights."""
        for module in modules:
            self._partition(module)

    def root(self, model: nn.Module) -> None:
        """Partition the rest."""
        self._partition(model)

    def _partition(self, module: nn.Module) -> None:
        whole = [parameter for parameter in module.parameters() if not is_partitioned(parameter)]
        for parameter in whole:
            # DeepSpeed expects partitioned weights in the compute dtype; it keeps fp32 master weights of trained ones.
            if parameter.dtype in CASTABLE and not hasattr(parameter, "quant_state"):
                # DeepSpeed writes into them, and pages of a mapped file would stay in memory until it is closed.
                parameter.data = parameter.data.to(self._dtype, copy=self._device.type == "cpu")
        for part in module.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer.to(self._device) if buffer is not None else None
        if not whole:
            return
        if self._first is None:
            # By name: importing DeepSpeed takes seconds, which no other engine needs.
            import_module("deepspeed").zero.Init(module=module, config_dict_or_path=self._config)
            self._first = whole[0]
        else:
            self._first.convert_to_zero_parameters(param_list=whole)


def placement_of(plan: RunPlan, device: torch.device) -> Placement:
    """Return the placement of the plan's engine; a collective under fsdp2 and hsdp."""
    engine = plan.topology.engine
    if engine in ("fsdp2", "hsdp"):
        return Fsdp2(make_mesh(plan.topology, device), plan.recipe.precision)
    if engine.startswith("zero3"):
        assert plan.deepspeed is not None
        return Zero3(dict(plan.deepspeed), plan.recipe.precision, device)
    return Placement()


def shard_again(model: nn.Module) -> None:
    """Shard what FSDP2 keeps whole for a backward pass that does not come; nothing under other engines.

    Whole parameters are other objects than the sharded ones that the optimizer steps and keeps states of.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def make_mesh(topology: Topology, device: torch.device) -> DeviceMesh:
    """Return a mesh of all ranks, or of copies x shards under hsdp, where neighbouring ranks share a copy."""
    world, group = topology.world_size, topology.shard_group
    if group is None:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // group, group), mesh_dim_names=("copy", "shard"))
