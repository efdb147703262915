"""Saves and loads the states of any optimizer of torch or bitsandbytes, by parameter name.

optimizer-*.safetensors    tensors, as `parameter name/slot`: whole, whatever the sharding was (rank_share.py)
optimizer.json             states that are not tensors, by the same keys; the loss scale of fp16

Every engine reads what another wrote; 8-bit states under ZeRO are the exception (zero_state.py).
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from packhorse.errors import UserError
from packhorse.model.sharded import shard_of
from packhorse.run_folder.layout import OPTIMIZER_FILE, OPTIMIZER_TENSORS
from packhorse.train.checkpoint.saved_tensor import PlainStates, SavedTensor
from packhorse.train.checkpoint.stored_tensor import StoredTensor, stored_tensors
from packhorse.train.checkpoint.weights import unwrapped
from packhorse.train.checkpoint.zero_state import PartitionLoader, saved_partitions
from packhorse.train.engine.engine import Engine


def saved_states(engine: Engine) -> tuple[list[SavedTensor], PlainStates]:
    """Return every state that the optimizer keeps, as `parameter name/slot`: tensors, and those that are not.

    Equal on all ranks. Tensors are whole in the shape of their parameter; gathering one is a collective where states
    are sharded.
    """
    optimizer, model = _stepped(engine)
    if engine.is_deepspeed:
        return saved_partitions(engine, model)
    tensors: list[SavedTensor] = []
    plain: PlainStates = {}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}/{slot}"
            if isinstance(value, Tensor):
                num_bytes = value.numel() * value.element_size()
                shard = value if isinstance(value, DTensor) else None
                tensors.append(SavedTensor(key, tuple(value.shape), num_bytes, partial(_whole, value), shard))
            elif value is not None:
                plain[key] = value
    return tensors, plain


def _whole(value: Tensor) -> AbstractContextManager[Tensor]:
    return nullcontext(value.full_tensor() if isinstance(value, DTensor) else value)


def load_states(engine: Engine, folder: Path) -> None:
    """Restore every state, sharded as its parameter is now; each rank reads its part of the files.

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


def _put(state: dict[str, Any], slot: str, value: float | StoredTensor, parameter: Tensor) -> None:
    existing = state.get(slot)
    if isinstance(existing, Tensor):
        existing.copy_(value[...] if isinstance(value, StoredTensor) else torch.tensor(value))
    elif isinstance(value, StoredTensor):
        state[slot] = _like(value, parameter)
    else:
        state[slot] = value


def _like(value: StoredTensor, parameter: Tensor) -> Tensor:
    """Return a state on the parameter's device, sharded as the parameter is; counters are whole everywhere."""
    if not value.shape or not isinstance(parameter, DTensor):
        return value[...].to(parameter.device)
    return shard_of(value, parameter)


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
