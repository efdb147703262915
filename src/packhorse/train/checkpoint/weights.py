"""Weights out of any engine, in Hugging Face form: gathered one parameter at a time, onto the host of rank 0."""

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
from packhorse.model.methods.attach import adapter_writer, is_adapted
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER
from packhorse.train.checkpoint.background import fresh_copy
from packhorse.train.checkpoint.check_written import check_written
from packhorse.train.checkpoint.snapshot import Snapshot
from packhorse.train.checkpoint.zero_state import whole_master
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.precision import COMPUTE_DTYPES


def weights_folder_name(plan: RunPlan) -> str:
    """`model` where its own weights are trained, else `adapter`."""
    return MODEL_FOLDER if plan.recipe.method.trains_base else ADAPTER_FOLDER


def gather_kept(engine: Engine, is_main: bool, snapshot: Snapshot | None = None) -> dict[str, Tensor]:
    """Whole tensors of what is kept, by name, on the CPU of rank 0; empty on other ranks.

    Of an adapter its trained parameters; of a model all parameters, the frozen ones too, and the buffers that belong
    to its files. What is trained is float32 under every engine. A collective: every rank calls it.

    Args:
        engine: What is trained.
        is_main: Whether this is rank 0.
        snapshot: What copies them; weights whose shards it takes are whole only after its `gather_weights`.
    """

    def copy(name: str, value: Tensor) -> Tensor:
        return fresh_copy(value) if snapshot is None else snapshot.copy(name, value)

    model = unwrapped(engine)
    adapted = is_adapted(model)
    gathered = {}
    for name, parameter in model.named_parameters():
        if adapted and not parameter.requires_grad:
            continue
        if snapshot is not None and snapshot.takes_shard(parameter):
            room = snapshot.hold_weight(name, parameter)
            if is_main:
                gathered[name] = room
            continue
        with _whole(parameter) as value:
            if is_main:
                gathered[name] = copy(name, value)
    if is_main and not adapted:
        gathered |= {name: copy(name, buffer) for name, buffer in _kept_buffers(model)}
    return gathered


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Such as the routing biases of some mixtures of experts; no engine shards them."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                yield name, buffer


def unwrapped(engine: Engine) -> nn.Module:
    """The model below DDP or DeepSpeed."""
    model: nn.Module = engine.accelerator.unwrap_model(engine.model)
    return model


@contextmanager
def _whole(parameter: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """The weight as it is stepped: DeepSpeed's float32 master where it computes with one of 16 bits."""
    master = whole_master(parameter)
    if master is not None:
        yield master
    elif isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        # By its own methods, as `deepspeed.zero.GatheredParameters` does.
        parameter.all_gather()
        try:
            yield parameter
        finally:
            parameter.partition()
    else:
        yield parameter


def weights_writer(
    model: Any,  # noqa: ANN401
    weights: dict[str, Tensor],
    dtype: torch.dtype | None,
    is_result: bool = False,
    was_stepped: bool = False,
) -> Callable[[Path], None]:
    """What writes the adapter or the model into a folder, as safetensors with its configuration, and reads it again.

    It may be called while the model trains: then it looks at nothing that a step changes.

    Args:
        model: The unwrapped transformers or peft model.
        weights: What `gather_kept` gave.
        dtype: Type to store, None to keep what training held.
        is_result: To be used, not to be trained on: an adapter then stands on the base as it is on disk.
        was_stepped: The optimizer has stepped since training began.

    Returns:
        The writer; it raises a UserError where what it wrote is not what was to be written.
    """
    adapter = adapter_writer(model, weights, for_base=is_result) if is_adapted(model) else None

    def write(folder: Path) -> None:
        if adapter is not None:
            adapter(folder)
        else:
            _write_model(model, weights, folder, dtype)
        check_written(folder, weights, model, dtype, was_stepped)

    return write


def _write_model(model: Any, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:  # noqa: ANN401
    floating = {name: value for name, value in weights.items() if dtype is not None and value.is_floating_point()}
    # A dictionary of its own: transformers empties it as it writes.
    chosen = weights | {name: value.to(dtype) for name, value in floating.items()}
    model.save_pretrained(folder, state_dict=chosen, safe_serialization=True)


def save_weights(
    model: Any,  # noqa: ANN401
    weights: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    is_result: bool = False,
    was_stepped: bool = False,
) -> None:
    """Writes at once; the arguments, and what it raises, are those of `weights_writer`."""
    weights_writer(model, weights, dtype, is_result, was_stepped)(folder)


def publish_result(plan: RunPlan, engine: Engine, tokenizer: Any, is_main: bool) -> None:  # noqa: ANN401
    """Writes RUN/model or RUN/adapter with its tokenizer, in the type that training computed in; a collective."""
    weights = gather_kept(engine, is_main)
    if not is_main:
        return
    name = weights_folder_name(plan)
    target = Path(plan.run_folder) / name
    temporary = target.with_name(f".{name}.tmp")
    dtype = COMPUTE_DTYPES[plan.recipe.precision] if name == MODEL_FOLDER else None
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_weights(unwrapped(engine), weights, temporary, dtype, is_result=True)
        tokenizer.save_pretrained(temporary)
        publish_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(target, error) from error
