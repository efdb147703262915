"""Gathers the weights of any engine, one parameter at a time, on the host of rank 0, and writes them as HF files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packhorse.durable import disk_error, publish_folder
from packhorse.model.methods.adapter_files import adapter_writer
from packhorse.model.methods.attach import is_adapted
from packhorse.model.sharded import gathered
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER
from packhorse.train.checkpoint.rank_share import copy_to_host
from packhorse.train.checkpoint.snapshot import Snapshot
from packhorse.train.checkpoint.verify_weights import verify_weights
from packhorse.train.checkpoint.zero_state import gather_master_weight
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.precision import COMPUTE_DTYPES


def weights_folder_name(plan: RunPlan) -> str:
    """Return `model` where the base's own weights are trained, else `adapter`."""
    return MODEL_FOLDER if plan.recipe.method.trains_base else ADAPTER_FOLDER


def gather_saved_weights(engine: Engine, is_main: bool, snapshot: Snapshot | None = None) -> dict[str, Tensor]:
    """Return whole tensors of all saved weights, by name, on the CPU of rank 0; empty on other ranks. A collective.

    For an adapter, these are its trained parameters; for a model, all parameters, frozen ones too, and the persistent
    buffers. Trained weights are float32 under every engine.

    Args:
        engine: The engine with the model.
        is_main: Whether this is rank 0.
        snapshot: Copies the tensors; weights that it takes in shards are whole only after its `gather_weights`.
    """

    def copy(name: str, value: Tensor) -> Tensor:
        return copy_to_host(value) if snapshot is None else snapshot.copy(name, value)

    model = unwrapped(engine)
    adapted = is_adapted(model)
    weights = {}
    for name, parameter in model.named_parameters():
        if adapted and not parameter.requires_grad:
            continue
        if snapshot is not None and snapshot.takes_shard(parameter):
            held = snapshot.hold_weight(name, parameter)
            if is_main:
                weights[name] = held
            continue
        with _whole(parameter) as value:
            if is_main:
                weights[name] = copy(name, value)
    if is_main and not adapted:
        weights |= {name: copy(name, buffer) for name, buffer in _persistent_buffers(model)}
    return weights


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers such as the routing biases of some mixtures of experts; no engine shards them."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, buffer


def unwrapped(engine: Engine) -> nn.Module:
    """Return the model inside DDP or DeepSpeed."""
    model: nn.Module = engine.accelerator.unwrap_model(engine.model)
    return model


@contextmanager
def _whole(parameter: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Give the weight that is stepped: DeepSpeed's float32 master weight where it computes in 16 bits."""
    master = gather_master_weight(parameter)
    if master is not None:
        yield master
    elif isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    else:
        with gathered(parameter):
            yield parameter


def weights_writer(
    model: Any,  # noqa: ANN401
    weights: dict[str, Tensor],
    dtype: torch.dtype | None,
    is_result: bool = False,
    was_stepped: bool = False,
) -> Callable[[Path], None]:
    """Return a function that writes the adapter or model to a folder, as safetensors with its config, and verifies it.

    The function may be called while the model trains: it reads nothing that a step changes.

    Args:
        model: The unwrapped transformers or peft model.
        weights: Weights from `gather_saved_weights`.
        dtype: Dtype to store, None for that of training.
        is_result: The files are the run's result: an adapter is then written for the unchanged base on disk.
        was_stepped: The optimizer has stepped since training began.

    Returns:
        The function; it raises a UserError where the files differ from the weights.
    """
    adapter = adapter_writer(model, weights, for_base=is_result) if is_adapted(model) else None

    def write(folder: Path) -> None:
        if adapter is not None:
            adapter(folder)
        else:
            _write_model(model, weights, folder, dtype)
        verify_weights(folder, weights, model, dtype, was_stepped)

    return write


def _write_model(model: Any, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:  # noqa: ANN401
    floating = {name: value for name, value in weights.items() if dtype is not None and value.is_floating_point()}
    # A new dictionary, because transformers empties it while writing.
    chosen = weights | {name: value.to(dtype) for name, value in floating.items()}
    model.save_pretrained(folder, state_dict=chosen, safe_serialization=True)


def publish_result(plan: RunPlan, engine: Engine, tokenizer: Any, is_main: bool) -> None:  # noqa: ANN401
    """Write RUN/model or RUN/adapter with its tokenizer, in the dtype that training computed in; a collective."""
    weights = gather_saved_weights(engine, is_main)
    if not is_main:
        return
    name = weights_folder_name(plan)
    target = Path(plan.run_folder) / name
    temporary = target.with_name(f".{name}.tmp")
    dtype = COMPUTE_DTYPES[plan.recipe.precision] if name == MODEL_FOLDER else None
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        weights_writer(unwrapped(engine), weights, dtype, is_result=True)(temporary)
        tokenizer.save_pretrained(temporary)
        publish_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(target, error) from error
