"""Training state: the step is also the data cursor, since the batch plan is a pure function of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class TrainState:
    """Counters that a checkpoint stores.

    Attributes:
        step: Optimizer steps done.
        num_supervised_tokens: Tokens learnt from so far, over all ranks.
        num_skipped_steps: Steps among them that were skipped because their gradient overflowed fp16.
        elapsed_seconds: Training time over all attempts.
        best_step: Step of the lowest validation loss, None before the first evaluation.
        best_loss: Lowest validation loss, nats per supervised token.
        recent_losses: Losses of the last steps that learnt, nats per supervised token, to detect a spike.
        held_back: Figures of this step that are not reported yet, because a stop request interrupted the evaluation
            that belongs to them; the resumed run evaluates first.
    """

    step: int = 0
    num_supervised_tokens: int = 0
    num_skipped_steps: int = 0
    elapsed_seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    recent_losses: tuple[float, ...] = ()
    held_back: dict[str, float] | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> TrainState:
        """Return the state from its JSON record, where tuples have become lists."""
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "recent_losses": tuple(fields["recent_losses"])})

    def advanced(self, num_supervised_tokens: int, skipped: bool = False) -> TrainState:
        """Return the state one step later."""
        return replace(
            self,
            step=self.step + 1,
            num_supervised_tokens=self.num_supervised_tokens + num_supervised_tokens,
            num_skipped_steps=self.num_skipped_steps + skipped,
            held_back=None,
        )

    def learnt(self, loss: float, window_steps: int) -> TrainState:
        """Return the state with this step's loss among the recent ones."""
        return replace(self, recent_losses=(*self.recent_losses, loss)[-window_steps:])

    def evaluated(self, loss: float) -> TrainState:
        """Return the state with this validation loss as the best one, where it is lower."""
        if self.best_loss is not None and loss >= self.best_loss:
            return self
        return replace(self, best_step=self.step, best_loss=loss)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank.

    Random numbers (dropout) are therefore a function of the step, like the packs: a resumed run draws what an
    uninterrupted one would have drawn, and no generator state needs to be stored.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
