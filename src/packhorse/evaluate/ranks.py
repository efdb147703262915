"""The ranks that measure a model together: rows are dealt to them, and their results are summed up in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from packhorse.evaluate.models import Model


@dataclass(frozen=True)
class Ranks:
    """This process among those that measure a model.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        in_step: Whether the weights are sharded: every rank then takes part in every forward pass.
        device: Device of the inputs; None for that of the model's first weight.
        group: Process group on the CPU; None for one process.
    """

    rank: int = 0
    size: int = 1
    in_step: bool = False
    device: torch.device | None = None
    group: dist.ProcessGroup | None = None

    def total(self, own: Tensor) -> Tensor:
        """Return the sum of a tensor on the CPU over all ranks; a collective."""
        if self.group is not None:
            dist.all_reduce(own, group=self.group)
        return own

    def any(self, own: bool) -> bool:
        """Return whether a forward pass is needed: by this rank, or by any where ranks run in step."""
        return bool(self.total(torch.tensor(int(own)))) if self.in_step else own

    def device_of(self, model: Model) -> torch.device:
        """Return the device of the model's inputs."""
        return self.device or model.device

    def idle_pass(self, model: Model) -> None:
        """Take part in a forward pass for the other ranks, with one token."""
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device_of(model)), use_cache=False)


ALONE: Final = Ranks()
