"""What a checkpoint consists of: tensors, the files that they are written to, and the rank that writes each file.

All ranks list the same tensors in the same order, so each computes the same division without asking the others:

    weights    files of whole decoder layers, one after another to the rank with the fewest bytes
    states     one tensor after another to the rank with the fewest bytes, and each rank's into files
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from packhorse.run_folder.layout import optimizer_tensors_name

MAX_FILE_BYTES: Final = 4 * 2**30
"""Most bytes in one file; a larger tensor or decoder layer has its own file."""

FileTensors = dict[str, Tensor]
"""Tensors of one file, on the CPU."""

PlainStates = dict[str, int | float | bool]
"""States of the optimizer that are not tensors, by key."""


def copy_to_host(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory; `dtype` None keeps that of the tensor."""
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


@dataclass(frozen=True)
class SavedTensor:
    """A weight or an optimizer state.

    Attributes:
        key: Name of a weight, or `parameter name/slot` of a state.
        shape: Whole shape.
        num_bytes: Bytes of the whole tensor.
        whole: Gives the whole tensor on the device; a collective where it is sharded.
        shard: This rank's part under FSDP2.
    """

    key: str
    shape: tuple[int, ...]
    num_bytes: int
    whole: Callable[[], AbstractContextManager[Tensor]]
    shard: DTensor | None = None

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Return the bytes of the whole tensor in a dtype, None for its own."""
        return self.num_bytes if dtype is None else prod(self.shape) * dtype.itemsize


def held_whole(tensor: Tensor) -> AbstractContextManager[Tensor]:
    """Give a tensor that every rank has."""
    return nullcontext(tensor)


Write = Callable[[Path, FileTensors], list[Path]]
"""Writes tensors to a file, and returns every file that it wrote."""


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint.

    Attributes:
        name: Path in the folder of the checkpoint.
        tensors: Tensors in it.
        write: Writes it.
    """

    name: str
    tensors: Sequence[SavedTensor]
    write: Write

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def deal_files(files: Iterable[SavedFile], loads: list[int]) -> list[list[SavedFile]]:
    """Return the files of each rank; `loads` are the bytes that each rank writes already, and are added to."""
    dealt: list[list[SavedFile]] = [[] for _ in loads]
    for file in files:
        owner = loads.index(min(loads))
        loads[owner] += file.num_bytes
        dealt[owner].append(file)
    return dealt


def deal_states(states: Iterable[SavedTensor], loads: list[int]) -> list[list[SavedFile]]:
    """Return the files of optimizer states of each rank; `loads` as in `deal_files`."""
    dealt: list[list[SavedTensor]] = [[] for _ in loads]
    for state in states:
        owner = loads.index(min(loads))
        loads[owner] += state.num_bytes
        dealt[owner].append(state)
    return [
        [
            SavedFile(optimizer_tensors_name(rank, number), part, write_states)
            for number, part in enumerate(split_into_files([[state] for state in own]), start=1)
        ]
        for rank, own in enumerate(dealt)
    ]


def split_into_files(
    groups: Iterable[Sequence[SavedTensor]], dtype: torch.dtype | None = None
) -> Iterator[list[SavedTensor]]:
    """Yield the tensors of one file after another, in their order; a group is never split.

    Args:
        groups: Tensors that belong into one file.
        dtype: Dtype in the files, None for that of each tensor.
    """
    part: list[SavedTensor] = []
    part_bytes = 0
    for group in groups:
        group_bytes = sum(tensor.bytes_as(dtype) for tensor in group)
        if part and part_bytes + group_bytes > MAX_FILE_BYTES:
            yield part
            part, part_bytes = [], 0
        part = [*part, *group]
        part_bytes += group_bytes
    if part:
        yield part


def write_states(file: Path, tensors: FileTensors) -> list[Path]:
    """Write optimizer states."""
    save_file(tensors, file)
    return [file]


def gather_files(
    files: Sequence[Sequence[SavedFile]], rank: int, fetch: Callable[[SavedTensor, int], Tensor | None]
) -> Iterator[tuple[SavedFile, FileTensors]]:
    """Yield this rank's files with their tensors, one file at a time; a collective where `fetch` is one.

    In each turn all ranks gather one file for every rank, and only then write, so that they write at the same time.

    Args:
        files: Files of each rank.
        rank: Rank of this process.
        fetch: Returns a tensor on the CPU for the rank that writes it, given second; None on the others.
    """
    for turn in zip_longest(*files):
        own: FileTensors = {}
        for owner, file in enumerate(turn):
            for tensor in file.tensors if file is not None else ():
                value = fetch(tensor, owner)
                if value is not None:
                    own[tensor.key] = value
        if turn[rank] is not None:
            yield turn[rank], own
