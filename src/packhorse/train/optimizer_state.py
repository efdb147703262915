"""What an optimizer keeps for each parameter, on disk: any optimizer of torch or bitsandbytes, whole or sharded.

optimizer-00001.safetensors …    tensors, as `parameter name/slot`: whole, whatever the sharding was
optimizer.json                   what is no tensor, by the same keys; the loss scale of fp16

DeepSpeed keeps its own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from packhorse.errors import UserError

LARGEST_FILE_BYTES = 4 * 2**30
"""Rank 0 never holds more of the states than this on its host."""
OTHERS_FILE = "optimizer.json"
PATTERN = "optimizer-*.safetensors"

Others = dict[str, int | float | bool]


def save_optimizer(optimizer: Optimizer, model: nn.Module, scaler: Any, folder: Path, is_main: bool) -> None:  # noqa: ANN401
    """Gathers one tensor at a time; rank 0 writes it. A collective where states are sharded.

    Args:
        optimizer: Not wrapped.
        model: Whose parameters it steps, not wrapped.
        scaler: Of fp16's loss; None under other precisions.
        folder: Exists.
        is_main: Whether this rank writes.

    Raises:
        OSError: The disk refuses.
        SafetensorError: The same, from within safetensors.
    """
    others: Others = {}
    waiting: dict[str, Tensor] = {}
    waiting_bytes, num_files = 0, 0
    for key, value in _states(optimizer, model):
        if not isinstance(value, Tensor):
            others[key] = value
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if not is_main:
            continue
        if waiting and waiting_bytes + whole.nbytes > LARGEST_FILE_BYTES:
            num_files += 1
            save_file(waiting, folder / f"optimizer-{num_files:05d}.safetensors")
            waiting, waiting_bytes = {}, 0
        waiting[key] = whole.detach().to("cpu", copy=True).contiguous()
        waiting_bytes += whole.nbytes
    if not is_main:
        return
    if waiting:
        save_file(waiting, folder / f"optimizer-{num_files + 1:05d}.safetensors")
    record = {"states": others, "scaler": scaler.state_dict() if scaler is not None else {}}
    (folder / OTHERS_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_optimizer(optimizer: Optimizer, model: nn.Module, scaler: Any, folder: Path) -> None:  # noqa: ANN401
    """Puts every state where it was, sharded as its parameter is now; each rank reads the files.

    Raises:
        UserError: The states are of other parameters than those that are trained.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    record = json.loads((folder / OTHERS_FILE).read_text(encoding="utf-8"))
    _make_buffers(optimizer)
    found: set[str] = set()
    for key, value in (*record["states"].items(), *_tensors(folder)):
        name, slot = key.rsplit("/", 1)
        found.add(name)
        if name in parameters:
            _put(optimizer.state[parameters[name]], slot, value, parameters[name])
    _refuse_others(found, set(parameters), folder)
    if scaler is not None:
        scaler.load_state_dict(record["scaler"])


def _states(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Key and value of every state, in the order of the parameters, which is that of every rank."""
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                yield f"{name}/{slot}", value


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob(PATTERN)):
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
            "resume with the recipe and the versions of the libraries that wrote it.",
        )
