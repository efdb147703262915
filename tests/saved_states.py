"""Writes the optimizer's states to files as a checkpoint does, without a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from packhorse.run_folder.layout import OPTIMIZER_FILE
from packhorse.train.checkpoint.optimizer_state import gather_states, scale_of
from packhorse.train.checkpoint.rank_share import (
    PlainStates,
    RankShare,
    assign_to_ranks,
    copy_to_host,
    split_into_files,
)
from packhorse.train.engine.engine import Engine


def save_states(engine: Engine, folder: Path) -> None:
    """Write this rank's share; a collective where states are sharded. Rank 0 also writes the small file."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    plain: PlainStates = {}
    states = assign_to_ranks(gather_states(engine), [0] * ranks, plain)
    parts = list(split_into_files([(key, copy_to_host(value)) for key, value, owner in states if owner == rank]))
    text = json.dumps({"states": plain, "scaler": scale_of(engine)})
    RankShare(folder, rank, parts, texts={OPTIMIZER_FILE: lambda: text} if rank == 0 else {}).write()
