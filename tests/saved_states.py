"""The optimizer's states in files, as a checkpoint has them, without a run around them."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from packhorse.run_folder.layout import OPTIMIZER_FILE
from packhorse.train.checkpoint.background import Others, Share, dealt, fresh_copy, in_files
from packhorse.train.checkpoint.optimizer_state import gather_states, scale_of
from packhorse.train.engine.engine import Engine


def save_states(engine: Engine, folder: Path) -> None:
    """Writes this rank's share; a collective where states are sharded. Rank 0 also writes what is no tensor."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    others: Others = {}
    states = dealt(gather_states(engine), [0] * ranks, others)
    parts = list(in_files([(key, fresh_copy(value)) for key, value, owner in states if owner == rank]))
    text = json.dumps({"states": others, "scaler": scale_of(engine)})
    Share(folder, rank, parts, texts={OPTIMIZER_FILE: lambda: text} if rank == 0 else {}).write()
