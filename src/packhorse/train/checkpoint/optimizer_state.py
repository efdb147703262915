"""What an optimizer keeps for each parameter, on disk: any optimizer of torch or bitsandbytes, whole or sharded.

optimizer-*.safetensors    tensors, as `parameter name/slot`: whole, whatever the sharding was (saving.py)
optimizer.json             what is no tensor, by the same keys; the loss scale of fp16

The same for every engine, so that any of them reads what another wrote; 8-bit states under ZeRO are the exception
(zero_state.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from packhorse.errors import UserError
from packhorse.run_folder.layout import OPTIMIZER_FILE, OPTIMIZER_TENSORS
from packhorse.train.checkpoint.snapshot import Snapshot
from packhorse.train.checkpoint.weights import unwrapped
from packhorse.train.checkpoint.zero_state import PieceLoader, gather_pieces
from packhorse.train.engine.engine import Engine


def gather_states(
    engine: Engine, snapshot: Snapshot | None = None
) -> Iterator[tuple[str, Tensor | int | float | bool]]:
    """Every state that the optimizer keeps, as (`parameter name/slot`, value).

    A collective where states are sharded: every rank iterates to the end, and all of them get the same keys in the
    same order. Tensors are whole, in the shape of their parameter, on the device; one exists at a time. Those whose
    shards `snapshot` takes stay sharded.
    """
    optimizer, model = _stepped(engine)
    if engine.is_deepspeed:
        yield from gather_pieces(engine, model)
        return
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            stays = not isinstance(value, DTensor) or (snapshot is not None and snapshot.takes_shard(value))
            yield f"{name}/{slot}", value if stays else value.full_tensor()


def load_states(engine: Engine, folder: Path) -> None:
    """Puts every state where it was, sharded as its parameter is now; each rank reads the files.

    Raises:
        UserError: The states are of other parameters than those that are trained.
    """
    optimizer, model = _stepped(engine)
    record = json.loads((folder / OPTIMIZER_FILE).read_text(encoding="utf-8"))
    pieces = PieceLoader(engine) if engine.is_deepspeed else None
    if pieces is None:
        _make_buffers(optimizer)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: set[str] = set()
    for key, value in chain(record["states"].items(), _tensors(folder)):  # one tensor in memory at a time
        name, slot = key.rsplit("/", 1)
        if pieces is not None and pieces.put_piece(name, slot, value):
            continue
        found.add(name)
        if name not in parameters:
            continue
        if pieces is not None:
            pieces.put(name, parameters[name], slot, value)
        else:
            _put(optimizer.state[parameters[name]], slot, value, parameters[name])
    _refuse_others(found, set(parameters), folder)
    _set_scale(engine, record["scaler"])


def _stepped(engine: Engine) -> tuple[Optimizer, nn.Module]:
    """The optimizer below accelerate's wrapper, and the model whose parameters it steps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer), unwrapped(engine)


def scale_of(engine: Engine) -> dict[str, Any]:
    """The loss scale of fp16 and the steps since it last changed, as torch's GradScaler calls them; else nothing."""
    scaler = _scaler_of(engine)
    if scaler is None:
        return {}
    if not engine.is_deepspeed:
        return scaler.state_dict()  # type: ignore[no-any-return]
    stable = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {"scale": scaler.cur_scale, "_growth_tracker": stable, "hysteresis": scaler.cur_hysteresis}


def _set_scale(engine: Engine, record: dict[str, Any]) -> None:
    scaler = _scaler_of(engine)
    if scaler is None:
        return
    if not engine.is_deepspeed:
        state = scaler.state_dict()
        scaler.load_state_dict({name: record.get(name, value) for name, value in state.items()})
        return
    scaler.cur_scale = record["scale"]
    scaler.cur_iter, scaler.last_overflow_iter = record["_growth_tracker"], -1
    scaler.cur_hysteresis = record.get("hysteresis", scaler.cur_hysteresis)


def _scaler_of(engine: Engine) -> Any:  # noqa: ANN401
    """torch's or DeepSpeed's; None under other precisions than fp16."""
    if not engine.is_deepspeed:
        return engine.accelerator.scaler
    zero: Any = engine.model.optimizer
    return zero.loss_scaler if engine.loss_scale is not None else None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob(OPTIMIZER_TENSORS)):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield key, stored.get_tensor(key)


def _make_buffers(optimizer: Any) -> None:  # noqa: ANN401
    """Lets bitsandbytes make its states before they are filled: where they are paged, only it can."""
    for part in getattr(optimizer, "parts", [optimizer]):
        if not hasattr(part, "init_state"):
            continue
        for at, group in enumerate(part.param_groups):
            for index, parameter in enumerate(group["params"]):
                part.init_state(group, parameter, at, index)


def _put(state: dict[str, Any], slot: str, value: Any, parameter: Tensor) -> None:  # noqa: ANN401
    there = state.get(slot)
    if isinstance(there, Tensor):
        there.copy_(value)
    elif isinstance(value, Tensor):
        state[slot] = _like(value, parameter)
    else:
        state[slot] = value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """On the device of the parameter, and sharded as it is; counters are whole everywhere."""
    placed = value.to(parameter.device)
    if value.dim() == 0 or not isinstance(parameter, DTensor):
        return placed
    # Every rank has read the same: nothing is to be sent.
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _refuse_others(found: set[str], trained: set[str], folder: Path) -> None:
    others = sorted(found - trained)  # a parameter without a state is one that never had a gradient
    if others:
        raise UserError(
            f"{folder} holds optimizer states of {len(found)} parameters, and {len(trained)} are trained; "
            f"{others[0]} is not among them.",
            "states of other parameters would make other steps.",
            "resume with the recipe and the versions of the libraries that wrote it; 8-bit states of ZeRO also with "
            "the engine and the number of processes.",
        )
