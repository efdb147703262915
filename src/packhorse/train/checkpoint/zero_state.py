"""ZeRO's optimizer states by parameter name: whole tensors from the flat partitions that DeepSpeed keeps, and back.

DeepSpeed concatenates the parameters of a group, cuts the values into one partition per rank and steps that. Its
optimizer's states have the shape of a partition, so a parameter's part can be found, as `deepspeed.utils` does.

    parameters of a group      [ w0 ][  w1  ][w2]
    partitions of two ranks    [ rank 0 ][ rank 1]

8-bit states have another shape (values, and scales of their blocks), so whole partitions are stored:
`rank R of W/group G/slot`. Only the same stage on the same number of ranks can read these again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from packhorse.errors import UserError
from packhorse.model.sharded import is_partitioned, true_shape
from packhorse.train.checkpoint.saved_tensor import PlainStates, SavedTensor, held_whole
from packhorse.train.checkpoint.stored_tensor import StoredTensor, flat_part
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.process_group import own_rank, world_size

COUNTER = "step"
"""Slot that counts the steps, a number or a scalar tensor; one per partition."""

State = Tensor | int | float | bool


@dataclass(frozen=True)
class Partition:
    """This rank's partition of a parameter group.

    Attributes:
        parameters: Parameters of the group, in DeepSpeed's order.
        weights: Values that are stepped, float32, shape (values of this rank,).
        slots: States that the optimizer keeps for it; empty before the first step.
    """

    parameters: list[nn.Parameter]
    weights: Tensor
    slots: dict[str, Any]

    @property
    def is_by_weight(self) -> bool:
        """Whether each state has one value per weight, or one for all."""
        tensors = [value for value in self.slots.values() if isinstance(value, Tensor) and value.dim()]
        return all(value.shape == self.weights.shape for value in tensors)


def saved_partitions(engine: Engine, model: nn.Module) -> tuple[list[SavedTensor], PlainStates]:
    """Return every state, tensors whole and on the device once they are gathered, like `saved_states`.

    Returns nothing where DeepSpeed keeps the states in files (`zero3_nvme`): it cannot load them again.
    """
    zero: Any = engine.model.optimizer
    if getattr(zero, "swap_optimizer", False):
        return [], {}
    partitions = _partitions(engine)
    if not all(partition.is_by_weight for partition in partitions):
        return _by_rank(partitions, engine.device)
    _link(engine, partitions)
    tensors: list[SavedTensor] = []
    plain: PlainStates = {}
    owner = {id(parameter): partition for partition in partitions for parameter in partition.parameters}
    for name, parameter in model.named_parameters():
        for slot, value in owner[id(parameter)].slots.items() if id(parameter) in owner else ():
            if isinstance(value, Tensor) and value.dim():
                shape = true_shape(parameter)
                whole = partial(_whole_state, parameter, slot)
                tensors.append(SavedTensor(f"{name}/{slot}", tuple(shape), shape.numel() * value.element_size(), whole))
            else:
                _add(tensors, plain, f"{name}/{slot}", value)
    return tensors, plain


def _whole_state(parameter: nn.Parameter, slot: str) -> AbstractContextManager[Tensor]:
    return nullcontext(_deepspeed().safe_get_full_optimizer_state(parameter, slot))


def _add(tensors: list[SavedTensor], plain: PlainStates, key: str, value: State | None) -> None:
    """Add a counter, which every rank has."""
    if isinstance(value, Tensor):
        tensors.append(SavedTensor(key, tuple(value.shape), value.nbytes, partial(held_whole, value)))
    elif value is not None:
        plain[key] = value


class PartitionLoader:
    """Loads states into DeepSpeed's partitions, whatever engine wrote them."""

    def __init__(self, engine: Engine) -> None:
        """Make the states, which do not exist before the first step."""
        zero: Any = engine.model.optimizer
        _make_states(zero, _partitions(engine))
        partitions = _partitions(engine)
        _link(engine, partitions)
        self._owner = {id(parameter): partition for partition in partitions for parameter in partition.parameters}
        rank, world = own_rank(), world_size()
        self._own = {_partition_name(rank, world, group): partition for group, partition in enumerate(partitions)}
        self._all = {_partition_name(other, world, group) for other in range(world) for group in range(len(partitions))}
        self._counted: dict[tuple[int, str], float] = {}

    def put_partition(self, name: str, slot: str, value: float | StoredTensor) -> bool:
        """Load a state of a whole partition if it is this rank's; return whether `name` names a partition."""
        if name in self._own:
            _set(self._own[name].slots, slot, _read(value))
        return name in self._all

    def put(self, name: str, parameter: nn.Parameter, slot: str, value: float | StoredTensor) -> None:
        """Load a parameter's state, a whole tensor of which this rank reads its part, or a number.

        Raises:
            UserError: The optimizer keeps other states here, or the group has made another number of steps.
        """
        partition = self._owner[id(parameter)]
        if not partition.is_by_weight or slot not in partition.slots:
            raise UserError(
                f"the checkpoint holds {slot} of {name}, and ZeRO's optimizer keeps its states in another form here.",
                "8-bit states are stored by ZeRO's partitions, which only the same engine on the same number of "
                "processes cuts alike.",
                "resume with the engine and the number of processes that wrote it.",
            )
        if isinstance(value, StoredTensor) and value.shape:
            _set_part(parameter, value, slot)
            return
        number = _read(value)
        counted = self._counted.setdefault((id(partition.weights), slot), float(number))
        if counted != float(number):
            raise UserError(
                f"{name} has made {float(number):g} steps, and others of its group {counted:g}.",
                "ZeRO steps a whole group together and counts its steps once.",
                "resume with parallel.engine ddp or fsdp2.",
            )
        _set(partition.slots, slot, number)


def gather_master_weight(parameter: nn.Parameter) -> Tensor | None:
    """Return the float32 weight that DeepSpeed steps for a 16-bit one, whole and on the device; a collective.

    Returns:
        None where there is none: the parameter is float32, frozen, or not DeepSpeed's.
    """
    if not has_master_weight(parameter):
        return None
    whole: Tensor | None = _deepspeed().safe_get_full_fp32_param(parameter)
    return whole


def has_master_weight(parameter: nn.Parameter) -> bool:
    """Return whether DeepSpeed steps a float32 copy of the parameter."""
    owned = is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")
    if getattr(parameter, "nvme_swapper", None) is not None:  # kept in files, and never resumed from
        return False
    return owned and parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)


def set_master_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the float32 weight from a whole tensor; the 16-bit weight must already be its rounding."""
    _set_part(parameter, value, None)


def _partitions(engine: Engine) -> list[Partition]:
    zero: Any = engine.model.optimizer
    if hasattr(zero, "fp16_groups"):  # stage 3
        groups = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    else:
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    return [
        Partition(list(parameters), weights, zero.optimizer.state.get(weights, {})) for parameters, weights in groups
    ]


def _make_states(zero: Any, partitions: list[Partition]) -> None:  # noqa: ANN401
    """Let the optimizer make its states by a step with gradient 0 and learning rate 0, which changes no weight.

    torch, bitsandbytes and DeepSpeed's CPU Adam create different slots, dtypes and devices inside their first step; a
    step through DeepSpeed's own `_optimizer_step` makes the right ones for each, also under offloading.
    """
    groups = zero.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0  # weight decay is multiplied by it, so decays nothing either
    for index, partition in enumerate(partitions):
        before = partition.weights.grad
        partition.weights.grad = torch.zeros_like(partition.weights)
        zero._optimizer_step(index)
        partition.weights.grad = before  # under offloading a lasting buffer, otherwise None
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for partition in partitions:
        # The step was counted; a checkpoint that lacks this counter must not find a 1.
        slots = zero.optimizer.state[partition.weights]
        _set(slots, COUNTER, torch.zeros(()) if isinstance(slots[COUNTER], Tensor) else 0)


def _link(engine: Engine, partitions: list[Partition]) -> None:
    """Give stages 1 and 2 the position where each parameter's states are.

    DeepSpeed does this after the first group's first step, when the other groups have no states yet.
    """
    zero: Any = engine.model.optimizer
    if hasattr(zero, "fp16_groups"):
        return
    for partition in partitions:
        _deepspeed().lazy_init_hp_params_optimizer_state(partition.parameters, partition.weights, zero.optimizer.state)


def _by_rank(partitions: list[Partition], device: torch.device) -> tuple[list[SavedTensor], PlainStates]:
    tensors: list[SavedTensor] = []
    plain: PlainStates = {}
    world = world_size()
    for owner in range(world):
        for group, partition in enumerate(partitions):
            for slot, value in partition.slots.items():
                key = f"{_partition_name(owner, world, group)}/{slot}"
                if isinstance(value, Tensor) and value.dim():
                    sent = partial(_sent_by, owner, value, device)
                    tensors.append(SavedTensor(key, tuple(value.shape), value.nbytes, sent))
                else:
                    _add(tensors, plain, key, value)
    return tensors, plain


def _sent_by(owner: int, value: Tensor, device: torch.device) -> AbstractContextManager[Tensor]:
    """Give the owner's tensor; partitions are padded to one size, so every rank knows the shape."""
    sent = value.to(device, copy=True) if own_rank() == owner else torch.empty_like(value, device=device)
    if world_size() > 1:
        dist.broadcast(sent, src=owner)
    return nullcontext(sent)


def _partition_name(rank: int, world: int, group: int) -> str:
    return f"rank {rank} of {world}/group {group}"


def _set_part(parameter: Any, value: Tensor | StoredTensor, slot: str | None) -> None:  # noqa: ANN401
    """Copy this rank's part of a whole tensor, of any shape, into a state or, for None, into the weight."""
    if is_partitioned(parameter):
        # Stage 3 partitions every parameter separately, and pads the last rank's part.
        begin, end = own_part(parameter)
        part = flat_part(value, begin, end).to(torch.float32)
        part = functional.pad(part, (0, parameter.ds_tensor.numel() - part.numel()))
        set_weight, set_state = _deepspeed().safe_set_local_fp32_param, _deepspeed().safe_set_local_optimizer_state
    elif parameter._hp_mapping is None:
        return  # only other ranks have a part of it
    else:
        # These functions take the part themselves.
        part = value[...].to(torch.float32).flatten()
        set_weight, set_state = _deepspeed().safe_set_full_fp32_param, _deepspeed().safe_set_full_optimizer_state
    if slot is None:
        set_weight(parameter, part)
    else:
        set_state(parameter, part, slot)


def own_part(parameter: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return where this rank's part of a parameter that stage 3 has partitioned begins and ends, in its flat values."""
    size, whole = parameter.ds_tensor.numel(), true_shape(parameter).numel()
    begin = size * dist.get_rank(group=parameter.ds_process_group)
    return min(begin, whole), min(begin + size, whole)


def _read(value: float | StoredTensor) -> State:
    return value[...] if isinstance(value, StoredTensor) else value


def _set(slots: dict[str, Any], slot: str, value: State) -> None:
    existing = slots.get(slot)
    if isinstance(existing, Tensor):
        existing.copy_(torch.as_tensor(value))
    else:
        slots[slot] = value if not isinstance(value, Tensor) else value.item()


def _deepspeed() -> Any:  # noqa: ANN401
    """Import DeepSpeed by name: it takes seconds, which no other engine needs."""
    return import_module("deepspeed.utils")
