"""Weights, gradients and optimizer states that this rank keeps from step to step, and the planned bytes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packhorse.estimate import training_state
from packhorse.estimate.weights import WeightTensor
from packhorse.plan.run_plan import RunPlan
from packhorse.train.engine.engine import Engine

Sizes = dict[str, int]
"""Bytes by component: `weights`, `gradients`, `optimizer`."""


def planned_sizes(plan: RunPlan, weights: Iterable[WeightTensor]) -> Sizes:
    """Return the planned bytes of one rank at the end of a step's last backward pass."""
    listed = tuple(weights)
    components = training_state.weight_components(plan, listed)
    gradients = training_state.final_gradient_bytes(plan, listed) + training_state.zero3_gradient_bytes(plan, listed)
    return {
        "weights": sum(part.bytes for part in components if part.name != "persistent weights"),
        "gradients": gradients,
        "optimizer": training_state.optimizer_bytes(plan, listed) + training_state.master_bytes(plan, listed),
    }


def weight_tensors(model: nn.Module) -> list[Tensor]:
    """Return this rank's parts of all weights, and the scales of quantised ones."""
    found: list[Tensor] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.append(getattr(parameter, "ds_tensor", parameter))
            # FSDP2's parameter is another object than the quantised one, and only the layer still has the scales.
            scales = getattr(parameter, "quant_state", getattr(module, "quant_state", None))
            if scales is not None:
                found += [scales.absmax, scales.code]
                found += [scales.offset, scales.state2.absmax] if scales.nested else []
            # bitsandbytes moves the scales of 8-bit weights to the layer in its first pass.
            rows = (getattr(holder, "SCB", None) for holder in (parameter, getattr(module, "state", None)))
            found += [scale for scale in rows if isinstance(scale, Tensor)]
    return found


def gradient_tensors(engine: Engine) -> list[Tensor]:
    """Return this rank's parts of all gradients, between the last backward pass of a step and its update."""
    if not engine.is_deepspeed:
        return [parameter.grad for parameter in engine.model.parameters() if parameter.grad is not None]
    optimizer: Any = engine.model.optimizer
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return [optimizer.grad_partitions_flat_buffer]
    return [part for parts in optimizer.averaged_gradients.values() for part in parts or ()]


def state_tensors(engine: Engine) -> list[Tensor]:
    """Return this rank's optimizer states and DeepSpeed's float32 master weights, which exist after the first step."""
    optimizer: Any = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if engine.is_deepspeed:
        zero: Any = engine.model.optimizer
        found += getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all storages, each counted once; of a sharded tensor this rank's part."""
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum({address_of(each): each.untyped_storage().nbytes() for each in local}.values())


def address_of(tensor: Tensor) -> int:
    """Return the address of the storage of this rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
