"""The weights of any engine, and RUN/model or RUN/adapter, which is the run's result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packhorse.durable import disk_error, publish_folder, sync_to_disk
from packhorse.model.methods.adapter_files import adapter_writer
from packhorse.model.methods.attach import is_adapted
from packhorse.model.sharded import gathered, true_shape
from packhorse.model_spec.stored_weights import INDEX_FILE
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER
from packhorse.run_folder.result import Result, write_result
from packhorse.train.checkpoint.model_files import index_of, model_files
from packhorse.train.checkpoint.saved_tensor import SavedTensor, copy_to_host, deal_files, gather_files, held_whole
from packhorse.train.checkpoint.verify_weights import verify_weights
from packhorse.train.checkpoint.zero_state import gather_master_weight, has_master_weight
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.precision import COMPUTE_DTYPES
from packhorse.train.engine.process_group import own_rank, world_size
from packhorse.train.ranks.agreement import agreed_failure

Copy = Callable[[str, Tensor], Tensor]


def weights_folder_name(plan: RunPlan) -> str:
    """Return `model` where the base's own weights are trained, else `adapter`."""
    return MODEL_FOLDER if plan.recipe.method.trains_base else ADAPTER_FOLDER


def saved_weights(engine: Engine) -> list[SavedTensor]:
    """Return all saved weights, equal on every rank: trained ones are float32 under every engine.

    For an adapter, these are its trained parameters; for a model, all parameters, frozen ones too, and the persistent
    buffers.
    """
    model = unwrapped(engine)
    adapted = is_adapted(model)
    weights = []
    for name, parameter in model.named_parameters():
        if adapted and not parameter.requires_grad:
            continue
        width = 4 if has_master_weight(parameter) else parameter.element_size()
        shape = true_shape(parameter)
        shard = parameter if isinstance(parameter, DTensor) else None
        weights.append(SavedTensor(name, tuple(shape), width * shape.numel(), partial(_whole, parameter), shard))
    if not adapted:
        weights += [
            SavedTensor(name, tuple(buffer.shape), buffer.nbytes, partial(held_whole, buffer))
            for name, buffer in _persistent_buffers(model)
        ]
    return weights


def gather_saved_weights(engine: Engine, is_main: bool, copy: Copy | None = None) -> dict[str, Tensor]:
    """Return whole tensors of all saved weights, by name, on the CPU of rank 0; empty on other ranks. A collective.

    Args:
        engine: The engine with the model.
        is_main: Whether this is rank 0.
        copy: Copies a tensor of that name; None for new memory.
    """
    weights = {}
    for each in saved_weights(engine):
        with each.whole() as value:
            if is_main:
                weights[each.key] = copy_to_host(value) if copy is None else copy(each.key, value)
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


def adapter_files_writer(
    model: Any,  # noqa: ANN401
    weights: dict[str, Tensor],
    is_result: bool = False,
    was_stepped: bool = False,
) -> Callable[[Path], None]:
    """Return a function that writes an adapter to a folder, as safetensors with its config, and verifies it.

    The function may be called while the model trains: it reads nothing that a step changes.

    Args:
        model: The unwrapped peft model.
        weights: Weights from `gather_saved_weights`.
        is_result: The files are the run's result: the adapter is then written for the unchanged base on disk.
        was_stepped: The optimizer has stepped since training began.

    Returns:
        The function; it raises a UserError where the files differ from the weights.
    """
    adapter = adapter_writer(model, weights, for_base=is_result)

    def write(folder: Path) -> None:
        adapter(folder)
        verify_weights(folder, weights, model, None, was_stepped)

    return write


def publish_result(plan: RunPlan, engine: Engine, tokenizer: Any, result: Result, is_main: bool) -> None:  # noqa: ANN401
    """Write RUN/model or RUN/adapter, in the dtype that training computed in, its tokenizer and `result`; a collective.

    Raises:
        UserError: The disk refuses on some rank, or the written files are damaged.
    """
    name = weights_folder_name(plan)
    target = Path(plan.run_folder) / name
    temporary = target.with_name(f".{name}.tmp")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    engine.sum_over_ranks([0.0])  # nobody writes before it is removed
    write = _write_adapter if is_adapted(unwrapped(engine)) else _write_model
    failure = _failure(engine, target, write(engine, temporary, COMPUTE_DTYPES[plan.recipe.precision]))
    if is_main and failure is None:
        try:
            tokenizer.save_pretrained(temporary)
            write_result(temporary, result)
            publish_folder(temporary, target)
        except OSError as error:
            failure = disk_error(target, error)
    if is_main and failure is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    if failure is not None:
        raise failure


def _failure(engine: Engine, target: Path, error: Exception | None) -> Exception | None:
    if isinstance(error, (OSError, SafetensorError)):
        error = disk_error(target, error)
    return agreed_failure(engine, error)


def _write_adapter(engine: Engine, folder: Path, _: torch.dtype) -> Exception | None:
    is_main = own_rank() == 0
    weights = gather_saved_weights(engine, is_main)
    try:
        if is_main:
            adapter_files_writer(unwrapped(engine), weights, is_result=True)(folder)
    except Exception as error:
        return error
    return None


def _write_model(engine: Engine, folder: Path, dtype: torch.dtype) -> Exception | None:
    """Write this rank's files of the model; gathering continues after an error, because the other ranks wait."""
    rank, model = own_rank(), unwrapped(engine)
    files = model_files(model, saved_weights(engine), folder.name, dtype)
    error: Exception | None = None

    def fetch(tensor: SavedTensor, owner: int) -> Tensor | None:
        with tensor.whole() as value:
            return copy_to_host(value, dtype if value.is_floating_point() else None) if owner == rank else None

    for file, tensors in gather_files(deal_files(files, [0] * world_size()), rank, fetch):
        try:
            for path in file.write(folder.parent / file.name, tensors) if error is None else ():
                sync_to_disk(path)
        except Exception as caught:
            error = caught
        del tensors  # before those of the next file are gathered
    try:
        if rank == 0 and error is None and len(files) > 1:
            (folder / INDEX_FILE).write_text(index_of(model, files, dtype), encoding="utf-8")
    except OSError as caught:
        error = caught
    return error
