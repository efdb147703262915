"""Verifies written weights by reading them again: every tensor present, none empty, every value finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from packhorse.errors import UserError
from packhorse.model.methods.attach import is_adapted
from packhorse.train.checkpoint.stored_tensor import stored_tensors

LORA_B = ".lora_B."
SIZE_TOLERANCE = 0.01
"""Share of the bytes that safetensors' header may add."""


def verify_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    model: Any,  # noqa: ANN401
    dtype: torch.dtype | None,
    was_stepped: bool = False,
) -> None:
    """Read a safetensors file, or those of a folder, one tensor at a time.

    Args:
        path: File or folder that was just written.
        weights: Tensors that were to be written, by name in the model.
        model: The unwrapped model, which maps its names and shapes to those in a file. With an adapter it is peft's
            model; the file then has peft's names, and may hold more than was trained (PiSSA's start).
        dtype: Dtype that floating tensors were to be stored in; None for the dtype of each.
        was_stepped: The optimizer has stepped since training began, so some B of a low-rank adapter is not zero.

    Raises:
        UserError: A tensor is missing, empty, of another shape or not finite, every B is zero, or the files have
            another size.
    """
    shapes = {}
    is_nonzero = {}
    for name, stored in stored_tensors(path):
        tensor = stored[...]
        shapes[name] = tuple(tensor.shape)
        if LORA_B in name:
            is_nonzero[name] = bool(tensor.any())
        if not tensor.numel():
            raise _damaged(f"{name} in {path} has 0 elements.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise _damaged(f"{name} in {path} has {count:,} of {tensor.numel():,} numbers that are not finite.")
    if was_stepped and is_nonzero and not any(is_nonzero.values()):
        raise _damaged(f"each of {len(is_nonzero)} B matrices of the adapter in {path} is zero after a step.")
    expected_bytes = sum(_stored_bytes(value, dtype) for value in weights.values())
    written_bytes = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    if is_adapted(model):
        if written_bytes < expected_bytes:
            raise _damaged(f"{path} has {written_bytes:,} bytes of weights, and {expected_bytes:,} were trained.")
        return
    _compare(path, shapes, _shapes_in_files(model, weights))
    # Names and shapes match; the size also checks the dtype, with a header of some hundred bytes per tensor.
    most = expected_bytes * (1 + SIZE_TOLERANCE) + 512 * len(shapes)
    if not expected_bytes <= written_bytes <= most:
        raise _damaged(f"{path} has {written_bytes:,} bytes of weights instead of {expected_bytes:,}.")


def _stored_bytes(value: Tensor, dtype: torch.dtype | None) -> int:
    return value.numel() * (dtype if dtype is not None and value.is_floating_point() else value.dtype).itemsize


def _shapes_in_files(model: Any, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    """Return names and shapes as transformers writes them, such as single experts for fused ones."""
    empty = {name: value.to("meta") for name, value in weights.items()}
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, empty).items()}


def _compare(folder: Path, written: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    if written.keys() != expected.keys():
        name = sorted(written.keys() ^ expected.keys())[0]
        side = "unexpected" if name in written else "missing"
        raise _damaged(f"{folder} holds {len(written)} tensors, and the model has {len(expected)}; {name} is {side}.")
    for name, shape in expected.items():
        if written[name] != shape:
            raise _damaged(f"{name} in {folder} has shape {written[name]}, and {shape} in the model.")


def _damaged(fact: str) -> UserError:
    return UserError(
        fact,
        "such files load without an error, and the model answers nonsense.",
        "free or repair the disk, then resume from the last checkpoint: packhorse resume RUN.",
    )
