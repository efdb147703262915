"""ZeRO's optimizer states by parameter name: whole tensors out of the flat pieces that DeepSpeed keeps, and back.

DeepSpeed joins the parameters of a group, shares the numbers out over the ranks and steps each rank's piece. What its
optimizer keeps is of the piece's shape, so a parameter's share of it can be found, as `deepspeed.utils` does.

    parameters of a group    [ w0 ][  w1  ][w2]
    pieces of two ranks      [ rank 0 ][ rank 1]

States in 8 bits are of another shape (numbers, and scales of their blocks), so that the pieces themselves are stored:
`rank R of W/group G/slot`. Only the same stage on as many ranks can read these again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from packhorse.errors import UserError
from packhorse.train.engine.engine import Engine
from packhorse.train.ranks.identity import own_rank, world_size

COUNTER = "step"
"""Slot that counts the steps, a number or a tensor without dimensions; one for a whole piece."""

State = Tensor | int | float | bool


@dataclass(frozen=True)
class Piece:
    """This rank's share of a group.

    Attributes:
        parameters: The group's, in DeepSpeed's order.
        numbers: What is stepped, float32, shape (numbers of this rank,).
        slots: What the optimizer keeps for it; empty before the first step.
    """

    parameters: list[nn.Parameter]
    numbers: Tensor
    slots: dict[str, Any]

    @property
    def is_named(self) -> bool:
        """Whether each state is one number a weight, or one for all."""
        tensors = [value for value in self.slots.values() if isinstance(value, Tensor) and value.dim()]
        return all(value.shape == self.numbers.shape for value in tensors)


def gather_pieces(engine: Engine, model: nn.Module) -> Iterator[tuple[str, State]]:
    """Every state as (key, value), tensors whole and on the device; a collective, as `gather_states`.

    Nothing where DeepSpeed keeps the states in files (`zero3_nvme`): it has no way to bring them back.
    """
    zero: Any = engine.model.optimizer
    if getattr(zero, "swap_optimizer", False):
        return
    pieces = _pieces(engine)
    if not all(piece.is_named for piece in pieces):
        yield from _by_rank(pieces, engine.device)
        return
    _link(engine, pieces)
    owner = {id(parameter): piece for piece in pieces for parameter in piece.parameters}
    for name, parameter in model.named_parameters():
        for slot, value in owner[id(parameter)].slots.items() if id(parameter) in owner else ():
            if isinstance(value, Tensor) and value.dim():
                yield f"{name}/{slot}", _deepspeed().safe_get_full_optimizer_state(parameter, slot)
            elif value is not None:
                yield f"{name}/{slot}", value


class PieceLoader:
    """Puts states where DeepSpeed keeps them, whatever engine wrote them."""

    def __init__(self, engine: Engine) -> None:
        """Makes the states, which do not exist before the first step."""
        zero: Any = engine.model.optimizer
        _make_states(zero, _pieces(engine))
        self._pieces = _pieces(engine)
        _link(engine, self._pieces)
        self._owner = {id(parameter): piece for piece in self._pieces for parameter in piece.parameters}
        world = world_size()
        self._own = {_name_of(own_rank(), world, group): piece for group, piece in enumerate(self._pieces)}
        self._of_others = {_name_of(other, world, group) for other in range(world) for group in range(len(self._own))}
        self._counted: dict[tuple[int, str], float] = {}

    def put_piece(self, name: str, slot: str, value: State) -> bool:
        """Takes a state of a whole piece, this rank's or another's; says whether it was one."""
        if name in self._own:
            _set(self._own[name].slots, slot, value)
        return name in self._of_others

    def put(self, name: str, parameter: nn.Parameter, slot: str, value: State) -> None:
        """Takes a parameter's state, a whole tensor or a number.

        Raises:
            UserError: The optimizer here keeps something else, or the group has made another number of steps.
        """
        piece = self._owner[id(parameter)]
        if not piece.is_named or slot not in piece.slots:
            raise UserError(
                f"the checkpoint holds {slot} of {name}, and what ZeRO's optimizer keeps here has another form.",
                "states in 8 bits are stored by the pieces that ZeRO cuts, which only the same engine on as many "
                "processes cuts alike.",
                "resume with the engine and the number of processes that wrote it.",
            )
        if isinstance(value, Tensor) and value.dim():
            _set_share(parameter, value, slot)
            return
        counted = self._counted.setdefault((id(piece.numbers), slot), float(value))
        if counted != float(value):
            raise UserError(
                f"{name} has made {float(value):g} steps, and others of its group {counted:g}.",
                "ZeRO steps a whole group at once and counts once for all of it.",
                "resume with parallel.engine ddp or fsdp2.",
            )
        _set(piece.slots, slot, value)


def whole_master(parameter: nn.Parameter) -> Tensor | None:
    """The float32 weight that DeepSpeed steps beside one of 16 bits, whole and on the device; a collective.

    None where there is none: the parameter is float32, frozen, or not DeepSpeed's.
    """
    if not has_master(parameter):
        return None
    whole: Tensor | None = _deepspeed().safe_get_full_fp32_param(parameter)
    return whole


def has_master(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed steps a float32 copy of it."""
    owned = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    if getattr(parameter, "nvme_swapper", None) is not None:  # in files, and never gone on from
        return False
    return owned and parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)


def set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets the float32 weight from a whole tensor; that of 16 bits must be its rounding already."""
    _set_share(parameter, value, None)


def _pieces(engine: Engine) -> list[Piece]:
    zero: Any = engine.model.optimizer
    if hasattr(zero, "fp16_groups"):  # stage 3
        groups = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    else:
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    return [Piece(list(parameters), numbers, zero.optimizer.state.get(numbers, {})) for parameters, numbers in groups]


def _make_states(zero: Any, pieces: list[Piece]) -> None:  # noqa: ANN401
    """Lets the optimizer make its states by a step with gradient 0 and learning rate 0, which changes no weight."""
    groups = zero.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    for index, piece in enumerate(pieces):
        before = piece.numbers.grad
        piece.numbers.grad = torch.zeros_like(piece.numbers)
        zero._optimizer_step(index)
        piece.numbers.grad = before  # under offloading a buffer that stays, else None
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for piece in pieces:
        slots = zero.optimizer.state[piece.numbers]
        _set(slots, COUNTER, torch.zeros(()) if isinstance(slots[COUNTER], Tensor) else 0)


def _link(engine: Engine, pieces: list[Piece]) -> None:
    """Tells stages 1 and 2 where each parameter's states lie.

    DeepSpeed does it after the first group's first step, when the other groups have no states yet.
    """
    zero: Any = engine.model.optimizer
    if hasattr(zero, "fp16_groups"):
        return
    for piece in pieces:
        _deepspeed().lazy_init_hp_params_optimizer_state(piece.parameters, piece.numbers, zero.optimizer.state)


def _by_rank(pieces: list[Piece], device: torch.device) -> Iterator[tuple[str, State]]:
    rank, world = own_rank(), world_size()
    for owner in range(world):
        for group, piece in enumerate(pieces):
            for slot, value in piece.slots.items():
                key = f"{_name_of(owner, world, group)}/{slot}"
                if isinstance(value, Tensor) and value.dim():
                    # Pieces are padded to one size, so that every rank knows the shape.
                    sent = value.to(device, copy=True) if rank == owner else torch.empty_like(value, device=device)
                    if world > 1:
                        dist.broadcast(sent, src=owner)
                    yield key, sent
                elif value is not None:
                    yield key, value


def _name_of(rank: int, world: int, group: int) -> str:
    return f"rank {rank} of {world}/group {group}"


def _set_share(parameter: Any, value: Tensor, slot: str | None) -> None:  # noqa: ANN401
    """Copies this rank's share of a whole tensor, of any shape, into a state or, for None, into the weight."""
    flat = value.detach().to(torch.float32).flatten()
    if not hasattr(parameter, "ds_id"):
        # These take the share themselves, on the ranks that have one.
        set_weight, set_state = _deepspeed().safe_set_full_fp32_param, _deepspeed().safe_set_full_optimizer_state
    else:
        # Stage 3 shares out every parameter by itself, and fills the last rank's share up.
        size = parameter.ds_tensor.numel()
        start = size * dist.get_rank(group=parameter.ds_process_group)
        flat = flat[start : start + size]
        flat = functional.pad(flat, (0, size - flat.numel()))
        set_weight, set_state = _deepspeed().safe_set_local_fp32_param, _deepspeed().safe_set_local_optimizer_state
    if slot is None:
        set_weight(parameter, flat)
    else:
        set_state(parameter, flat, slot)


def _set(slots: dict[str, Any], slot: str, value: State) -> None:
    there = slots.get(slot)
    if isinstance(there, Tensor):
        there.copy_(torch.as_tensor(value))
    else:
        slots[slot] = value if not isinstance(value, Tensor) else value.item()


def _deepspeed() -> Any:  # noqa: ANN401
    """By name: importing DeepSpeed takes seconds that no other engine should pay."""
    return import_module("deepspeed.utils")
