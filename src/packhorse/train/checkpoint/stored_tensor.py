"""Tensors in safetensors files, of which a rank reads only the part that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file; indexing reads, on the CPU.

    Attributes:
        shape: Whole shape.
    """

    shape: tuple[int, ...]
    _stored: Any

    def __getitem__(self, rows: slice | EllipsisType) -> Tensor:
        tensor: Tensor = self._stored[rows]
        return tensor


def stored_tensors(path: Path, pattern: str = "*.safetensors") -> Iterator[tuple[str, StoredTensor]]:
    """Yield name and tensor of each entry in a safetensors file or those of a folder, to be read before the next."""
    for file in [path] if path.is_file() else sorted(path.glob(pattern)):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor = stored.get_slice(name)
                yield name, StoredTensor(tuple(tensor.get_shape()), tensor)


def flat_part(value: Tensor | StoredTensor, begin: int, end: int) -> Tensor:
    """Return values `begin` to `end` of the flattened tensor, of which only the rows that hold them are read."""
    if not value.shape:
        return value[...].flatten()[begin:end]
    width = prod(value.shape[1:])
    first, last = begin // width, -(-end // width)
    return value[first:last].flatten()[begin - first * width : end - first * width]
