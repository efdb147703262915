"""A sentence of each rank, for all of them; as bytes, since torch would send objects pickled."""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist

from packhorse.train.engine.engine import Engine

LONGEST_BYTES: Final = 4096


def texts_of_ranks(engine: Engine, text: str) -> list[str]:
    """What each rank says, by rank, cut to `LONGEST_BYTES` of UTF-8; a collective on the CPU."""
    if engine.control is None:
        return [text]
    own = torch.zeros(LONGEST_BYTES, dtype=torch.uint8)
    said = text.encode()[:LONGEST_BYTES]
    own[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
    every = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own, group=engine.control)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="ignore") for one in every]
