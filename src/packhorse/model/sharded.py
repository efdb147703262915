"""Parameters as an engine holds them: whole, in FSDP2's shards (DTensor), or partitioned by ZeRO-3.

ZeRO-3 leaves an empty tensor on each rank and keeps id, shape and size beside it, as `ds_…` attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has partitioned the parameter."""
    return hasattr(parameter, "ds_id")


def true_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@contextmanager
def gathered(parameter: Any, changed: bool = False) -> Iterator[None]:  # noqa: ANN401
    """Make a ZeRO-3 parameter whole on every rank, as `deepspeed.zero.GatheredParameters` does; a collective.

    Args:
        parameter: Any parameter; one that is not partitioned stays unchanged.
        changed: The parameter is changed meanwhile, alike on every rank, and must be partitioned from its new values.
    """
    if not is_partitioned(parameter):
        yield
        return
    parameter.all_gather()
    try:
        yield
    finally:
        parameter.partition(has_been_updated=changed)


def chunk_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """Return the rows of one rank, as `torch.chunk` cuts them for FSDP2: the last rank may have fewer, or none."""
    size = -(-num_rows // num_ranks)
    return slice(min(num_rows, rank * size), min(num_rows, (rank + 1) * size))


def shard_like(value: Tensor, parameter: DTensor) -> DTensor:
    """Return a whole tensor sharded as `parameter` is; every rank has the same value, so nothing is sent."""
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Readable(Protocol):
    """A tensor, or one in a file that is read by indexing."""

    @property
    def shape(self) -> Sequence[int]:
        """Whole shape."""

    def __getitem__(self, rows: Any, /) -> Tensor: ...  # noqa: ANN401


def is_by_rows(tensor: DTensor) -> bool:
    """Return whether each rank holds some rows of the tensor, or of one of its copies (FSDP2, HSDP)."""
    *copies, shard = tensor.placements
    return shard == Shard(0) and all(placement.is_replicate() for placement in copies)


def shard_of(value: Readable, parameter: DTensor) -> DTensor:
    """Return a whole tensor sharded as `parameter` is; of one in a file, each rank reads only its rows."""
    if not is_by_rows(parameter):
        return shard_like(value[...].to(parameter.device), parameter)
    mesh = parameter.device_mesh
    shape = torch.Size(value.shape)
    own = value[chunk_of(shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))]
    # Not a view of the file, which would stay open, nor of the whole tensor.
    local = own.to(parameter.device, copy=True).contiguous()
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def assign(parameter: Any, value: Tensor) -> None:  # noqa: ANN401
    """Overwrite a parameter with a whole tensor; under ZeRO-3 a collective.

    Args:
        parameter: A plain parameter, one that FSDP2 has sharded, or one that ZeRO-3 has partitioned.
        value: The whole tensor, equal on every rank.
    """
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(shard_like(value.to(parameter.device, parameter.dtype), parameter).to_local())
            return
        with gathered(parameter, changed=True):
            parameter.data.copy_(value)
