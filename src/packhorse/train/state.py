"""Where a run stands: the step is the data cursor, since the batch plan is a pure function of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class TrainState:
    """Counters that a checkpoint stores.

    Attributes:
        step: Optimizer steps done.
        num_supervised_tokens: Tokens learnt from so far, over all ranks.
        num_skipped_steps: Of these steps, those left out because their gradient overflowed fp16.
        elapsed_seconds: Over all attempts.
        best_step: Step of the lowest validation loss, None before the first evaluation.
        best_loss: That loss, nats per supervised token.
        held_back: Figures of this step, not reported yet, since the evaluation that belongs to them was broken off;
            who goes on measures it first.
    """

    step: int = 0
    num_supervised_tokens: int = 0
    num_skipped_steps: int = 0
    elapsed_seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    held_back: dict[str, float] | None = None

    def advanced(self, num_supervised_tokens: int, skipped: bool = False) -> TrainState:
        """One step further."""
        return replace(
            self,
            step=self.step + 1,
            num_supervised_tokens=self.num_supervised_tokens + num_supervised_tokens,
            num_skipped_steps=self.num_skipped_steps + skipped,
            held_back=None,
        )

    def evaluated(self, loss: float) -> TrainState:
        """With this validation loss taken into account."""
        if self.best_loss is not None and loss >= self.best_loss:
            return self
        return replace(self, best_step=self.step, best_loss=loss)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step of one rank.

    Random numbers (dropout) are thereby a function of the step, like the packs: a resumed run draws what the
    unbroken one would have drawn, and no generator state needs to be stored.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
