"""Writes the optimizer's states to files as a checkpoint does, without a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from packhorse.run_folder.layout import OPTIMIZER_FILE
from packhorse.train.checkpoint.optimizer_state import saved_states, scale_of
from packhorse.train.checkpoint.rank_share import RankShare
from packhorse.train.checkpoint.saved_tensor import SavedTensor, copy_to_host, deal_states, gather_files
from packhorse.train.engine.engine import Engine


def save_states(engine: Engine, folder: Path) -> None:
    """Write this rank's share; a collective where states are sharded. Rank 0 also writes the small file."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    states, plain = saved_states(engine)

    def fetch(state: SavedTensor, owner: int) -> Tensor | None:
        with state.whole() as value:
            return copy_to_host(value) if owner == rank else None

    files = gather_files(deal_states(states, [0] * ranks), rank, fetch)
    text = json.dumps({"states": plain, "scaler": scale_of(engine)})
    RankShare(folder, rank, files, texts={OPTIMIZER_FILE: lambda: text} if rank == 0 else {}).write()
