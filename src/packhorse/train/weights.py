"""Weights out of any engine, in Hugging Face form: gathered one parameter at a time, onto the host of rank 0."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packhorse.train.engine import Engine


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


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # DeepSpeed is only there to be imported where it runs.
    from deepspeed.zero import GatheredParameters  # noqa: PLC0415

    context: AbstractContextManager[Any] = GatheredParameters([parameter])
    return context


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
