"""Safetensors files of a model: read tensor by tensor, written tensor by tensor, so that memory holds one of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from packhorse.errors import UserError

INDEX: Final = "model.safetensors.index.json"
ALONE: Final = "model.safetensors"
BLOCK_NUMBERS: Final = 1 << 17
"""Numbers of a block: in fp32 it stays in a core's cache, which makes a merge three times as fast (docs/lab-log.md)."""
BLOCKS_AT_ONCE: Final = 32
"""Blocks that the other thread gets together: handing over each would cost as much as writing it."""
# Names of types in the header of a safetensors file (github.com/huggingface/safetensors, "Format").
TYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class WeightFiles:
    """The tensors of a folder of safetensors files, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Read the list of tensors.

        Raises:
            UserError: The folder has no weights, or a file that its index names is missing.
        """
        index = folder / INDEX
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(_existing(folder / ALONE), framework="pt") as opened:
                self._file_of = dict.fromkeys(opened.keys(), ALONE)
        for name in sorted(set(self._file_of.values())):
            _existing(folder / name)
        self.folder = folder
        self._opened: dict[str, Any] = {}

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors in each file."""
        found: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            found.setdefault(file, []).append(name)
        return found

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; nothing of it is read."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored type."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor

    def _handle(self, name: str) -> Any:  # noqa: ANN401
        file = self._file_of[name]
        if file not in self._opened:
            self._opened[file] = safe_open(self.folder / file, framework="pt")
        return self._opened[file]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UserError(
            f"{file.parent} has no {file.name}.",
            "some weights of the model are in that file.",
            "download or copy the folder again.",
        )
    return file


@dataclass(frozen=True)
class Written:
    """A tensor that is to be written: its name, type, shape, and the function that computes its blocks of rows."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield ranges of rows with about `BLOCK_NUMBERS` numbers each."""
    num_rows = shape[0] if shape else 1
    width = max(1, torch.Size(shape).numel() // max(1, num_rows))
    step = max(1, BLOCK_NUMBERS // width)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def write_safetensors(file: Path, tensors: Iterable[Written], progress: Callable[[int], None]) -> str:
    """Write a safetensors file, one tensor in memory at a time; it is on disk when this returns.

    Args:
        file: Path of the file.
        tensors: What it holds, in order.
        progress: Called with the bytes of each tensor that was written.

    Returns:
        SHA-256 of the file.
    """
    listed = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in listed:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    # While one block is hashed and written, the next is computed.
    with file.open("wb") as opened, ThreadPoolExecutor(1) as writer:

        def put(pieces: Sequence[Any]) -> None:  # bytes, or a tensor's memory
            for piece in pieces:
                digest.update(piece)
                opened.write(piece)

        pending = writer.submit(put, [len(text).to_bytes(8, "little") + text])
        waiting: list[Any] = []
        for tensor in listed:
            for block in tensor.blocks():
                waiting.append(block.to(tensor.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
                if len(waiting) == BLOCKS_AT_ONCE:
                    pending.result()
                    pending, waiting = writer.submit(put, waiting), []
            progress(tensor.bytes)
        pending.result()
        put(waiting)
        assert opened.tell() == 8 + len(text) + end, file
        opened.flush()
        os.fsync(opened.fileno())
    return digest.hexdigest()
