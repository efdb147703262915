"""Saves and loads the states of any optimizer of torch or bitsandbytes, by parameter name.

optimizer-*.safetensors    tensors, as `parameter name/slot`: whole, whatever the sharding was (rank_share.py)
optimizer.json             states that are not tensors, by the same keys; the loss scale of fp16

Every engine reads what another wrote; 8-bit states under ZeRO are the exception (zero_state.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from packhorse.errors import UserError
from packhorse.model.sharded import shard_like
from packhorse.run_folder.layout import OPTIMIZER_FILE, OPTIMIZER_TENSORS
from packhorse.train.checkpoint.snapshot import Snapshot
from packhorse.train.checkpoint.verify_weights import stored_tensors
from packhorse.train.checkpoint.weights import unwrapped
from packhorse.train.checkpoint.zero_state import PartitionLoader, gather_partitions
from packhorse.train.engine.engine import Engine


def gather_states(
    engine: Engine, snapshot: Snapshot | None = None
) -> Iterator[tuple[str, Tensor | int | float | bool]]:
    """Yield every state that the optimizer keeps, as (`parameter name/slot`, value).

    A collective where states are sharded: every rank iterates to the end, and gets the same keys in the same order.
    Tensors are whole, in the shape of their parameter, on the device; one exists at a time. States that `snapshot`
    takes in shards stay sharded.
    """
    optimizer, model = _stepped(engine)
    if engine.is_deepspeed:
        yield from gather_partitions(engine, model)
        return
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            unchanged = not isinstance(value, DTensor) or (snapshot is not None and snapshot.takes_shard(value))
            yield f"{name}/{slot}", value if unchanged else value.full_tensor()


def load_states(engine: Engine, folder: Path) -> None:
    """Restore every state, sharded as its parameter is now; each rank reads the files.

    Raises:
        UserError: The states belong to parameters that are not trained.
    """
    optimizer, model = _stepped(engine)
    record = json.loads((folder / OPTIMIZER_FILE).read_text(encoding="utf-8"))
    partitions = PartitionLoader(engine) if engine.is_deepspeed else None
    if partitions is None:
        _make_buffers(optimizer)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored: set[str] = set()
    # One tensor in memory at a time.
    for key, value in chain(record["states"].items(), stored_tensors(folder, OPTIMIZER_TENSORS)):
        name, slot = key.rsplit("/", 1)
        if partitions is not None and partitions.put_partition(name, slot, value):
            continue
        stored.add(name)
        if name not in parameters:
            continue
        if partitions is not None:
            partitions.put(name, parameters[name], slot, value)
        else:
            _put(optimizer.state[parameters[name]], slot, value, parameters[name])
    _refuse_unknown(stored, set(parameters), folder)
    _set_scale(engine, record["scaler"])


def _stepped(engine: Engine) -> tuple[Optimizer, nn.Module]:
    """Return the optimizer inside accelerate's wrapper, and the model whose parameters it steps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer), unwrapped(engine)


def scale_of(engine: Engine) -> dict[str, Any]:
    """Return fp16's loss scale and steps since its last change, by the keys of torch's GradScaler; otherwise empty."""
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
    """Return torch's or DeepSpeed's loss scaler; None without fp16."""
    if not engine.is_deepspeed:
        return engine.accelerator.scaler
    zero: Any = engine.model.optimizer
    return zero.loss_scaler if engine.loss_scale is not None else None


def _make_buffers(optimizer: Any) -> None:  # noqa: ANN401
    """Let bitsandbytes make its states before they are filled: only bitsandbytes can make paged ones."""
    for part in getattr(optimizer, "parts", [optimizer]):
        if not hasattr(part, "init_state"):
            continue
        for group_index, group in enumerate(part.param_groups):
            for index, parameter in enumerate(group["params"]):
                part.init_state(group, parameter, group_index, index)


def _put(state: dict[str, Any], slot: str, value: Any, parameter: Tensor) -> None:  # noqa: ANN401
    existing = state.get(slot)
    if isinstance(existing, Tensor):
        existing.copy_(value)
    elif isinstance(value, Tensor):
        state[slot] = _like(value, parameter)
    else:
        state[slot] = value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a state on the parameter's device, sharded as the parameter is; counters are whole everywhere."""
    moved = value.to(parameter.device)
    if value.dim() == 0 or not isinstance(parameter, DTensor):
        return moved
    return shard_like(moved, parameter)


def _refuse_unknown(stored: set[str], trained: set[str], folder: Path) -> None:
    unknown = sorted(stored - trained)  # a parameter without a state never had a gradient
    if unknown:
        raise UserError(
            f"{folder} holds optimizer states of {len(stored)} parameters, and {len(trained)} are trained; "
            f"{unknown[0]} is not among them.",
            "with states of other parameters the optimizer would make different steps.",
            "resume with the recipe and the versions of the libraries that wrote it; 8-bit states of ZeRO also with "
            "the engine and the number of processes.",
        )
