"""Weights out of any engine, in Hugging Face form: gathered one parameter at a time, onto the host of rank 0."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packhorse.durable import disk_error, publish_folder
from packhorse.plan.run_plan import RunPlan
from packhorse.train.engine import Engine


def weights_folder_name(plan: RunPlan) -> str:
    """`model` where its own weights are trained, else `adapter`."""
    return "model" if plan.recipe.method.trains_base else "adapter"


def gather_trainable(engine: Engine, is_main: bool) -> dict[str, Tensor]:
    """Whole tensors of the trainable parameters by name, on the CPU of rank 0; empty on other ranks.

    A collective: every rank calls it.
    """
    gathered = {}
    for name, parameter in unwrapped(engine).named_parameters():
        if not parameter.requires_grad:
            continue
        with _whole(parameter):
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            if is_main:
                gathered[name] = value.detach().to("cpu", copy=True)
    return gathered


def unwrapped(engine: Engine) -> nn.Module:
    """The model below DDP or DeepSpeed."""
    model: nn.Module = engine.accelerator.unwrap_model(engine.model)
    return model


@contextmanager
def _whole(parameter: Any) -> Iterator[None]:  # noqa: ANN401
    """Gathers a ZeRO-3 parameter by its own methods, as `deepspeed.zero.GatheredParameters` does."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    parameter.all_gather()
    try:
        yield
    finally:
        parameter.partition()


def save_weights(model: Any, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:  # noqa: ANN401
    """Writes the adapter or the model as safetensors with its configuration.

    Args:
        model: The unwrapped transformers or peft model.
        weights: What `gather_trainable` gave.
        folder: Where to; made if absent.
        dtype: Type to store, None to keep what training held.
    """
    chosen = {name: value if dtype is None else value.to(dtype) for name, value in weights.items()}
    model.save_pretrained(folder, state_dict=chosen, safe_serialization=True)


def publish_result(plan: RunPlan, engine: Engine, tokenizer: Any, is_main: bool) -> None:  # noqa: ANN401
    """Writes RUN/model or RUN/adapter with its tokenizer, in the type that training computed in; a collective."""
    weights = gather_trainable(engine, is_main)
    if not is_main:
        return
    name = weights_folder_name(plan)
    target = Path(plan.run_folder) / name
    temporary = target.with_name(f".{name}.tmp")
    dtype = torch.bfloat16 if plan.recipe.precision == "bf16" and name == "model" else None
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_weights(unwrapped(engine), weights, temporary, dtype)
        tokenizer.save_pretrained(temporary)
        publish_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(target, error) from error
