"""A model's weights as the files of a Hugging Face folder, each written by one rank, with an index for several.

model/model-00001-of-00003.safetensors    whole decoder layers, in the model's order
model/model.safetensors.index.json        the file of each tensor
model/config.json ...                     written with the first file
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from packhorse.model.units import Unit, units_of
from packhorse.train.checkpoint.saved_tensor import FileTensors, SavedFile, SavedTensor, Write, split_into_files
from packhorse.train.checkpoint.verify_weights import verify_weights

SINGLE: Final = "model.safetensors"


def model_files(
    model: Any,  # noqa: ANN401
    weights: Sequence[SavedTensor],
    folder: str,
    dtype: torch.dtype | None = None,
) -> list[SavedFile]:
    """Divide the weights over files; `dtype` is that of floating tensors in the files, None for that of each."""
    parts = list(split_into_files(_groups(model, weights), dtype))
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [SINGLE]
    return [
        SavedFile(f"{folder}/{name}", part, _writer(model, dtype, is_first=number == 0))
        for name, part, number in zip(names, parts, count())
    ]


def index_of(model: Any, files: Sequence[SavedFile], dtype: torch.dtype | None = None) -> str:  # noqa: ANN401
    """Return the text of the index; `dtype` as in `model_files`."""
    weight_map: dict[str, str] = {}
    for file in files:
        empty = {tensor.key: torch.empty(tensor.shape, device="meta") for tensor in file.tensors}
        weight_map |= dict.fromkeys(revert_weight_conversion(model, empty), Path(file.name).name)
    total = sum(tensor.bytes_as(dtype) for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _groups(model: Any, weights: Sequence[SavedTensor]) -> list[list[SavedTensor]]:  # noqa: ANN401
    """Return the weights of each unit; what transformers converts together, such as experts, is in one."""
    units = units_of(model)
    groups: dict[Unit | None, list[SavedTensor]] = {}
    for weight in weights:
        inside = (unit for unit in units if weight.key.startswith(tuple(f"{name}." for name in unit.names)))
        groups.setdefault(next(inside, None), []).append(weight)
    return list(groups.values())


def _writer(model: Any, dtype: torch.dtype | None, is_first: bool) -> Write:  # noqa: ANN401
    write_tensors = _write_with_config if is_first else _write_tensors

    def write(file: Path, tensors: FileTensors) -> list[Path]:
        written = write_tensors(model, file, tensors)
        verify_weights(file, tensors, model, dtype)
        return written

    return write


def _write_with_config(model: Any, file: Path, tensors: FileTensors) -> list[Path]:  # noqa: ANN401
    """Let transformers write a folder, which it does on rank 0 only, and put its files beside the others."""
    scratch = file.with_suffix("")
    model.save_pretrained(scratch, state_dict=dict(tensors), safe_serialization=True, max_shard_size=2**62)
    (scratch / SINGLE).rename(file)
    others = [path.rename(file.parent / path.name) for path in sorted(scratch.iterdir())]
    scratch.rmdir()
    return [file, *others]


def _write_tensors(model: Any, file: Path, tensors: FileTensors) -> list[Path]:  # noqa: ANN401
    file.parent.mkdir(exist_ok=True)
    stored = revert_weight_conversion(model, dict(tensors))
    save_file({name: value.contiguous() for name, value in stored.items()}, file, {"format": "pt"})
    return [file]
