"""A whole tensor into a parameter, wherever that lies: on one device, or in shards on all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def assign(parameter: Any, value: Tensor) -> None:  # noqa: ANN401
    """Overwrites a parameter; under ZeRO-3 a collective.

    Args:
        parameter: A plain parameter, one that FSDP2 has sharded, or one that DeepSpeed has partitioned.
        value: The whole tensor; every rank gives the same.
    """
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            local = value.to(parameter.device, parameter.dtype)
            # Each rank takes its own part: nothing is sent.
            shares = distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shares.to_local())
        elif hasattr(parameter, "ds_id"):
            parameter.all_gather()
            parameter.data.copy_(value)
            parameter.partition(has_been_updated=True)
        else:
            parameter.data.copy_(value)
