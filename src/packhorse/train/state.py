"""Training state: the step is also the data cursor, since the batch plan is a pure function of it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from packhorse.plan.run_plan import RunPlan


@dataclass(frozen=True)
class TrainState:
    """Counters that a checkpoint stores.

    Attributes:
        step: Optimizer steps done.
        num_supervised_tokens: Tokens learnt from so far, over all ranks.
        num_skipped_steps: Steps among them that were skipped because their gradient overflowed fp16.
        elapsed_seconds: Training time over all attempts.
        best_step: Step of the lowest validation loss among those with a planned checkpoint, None before the first.
        best_loss: Validation loss of `best_step`, nats per supervised token.
        improved_step: Step of the last evaluation that improved by more than `early_stopping.min_delta`.
        improved_loss: Validation loss of `improved_step`, nats per supervised token.
        num_without_improvement: Evaluations since `improved_step`.
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
    improved_step: int | None = None
    improved_loss: float | None = None
    num_without_improvement: int = 0
    recent_losses: tuple[float, ...] = ()
    held_back: dict[str, float] | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> TrainState:
        """Return the state from its JSON record, where tuples have become lists; older records lack some counters."""
        fields = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
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

    def evaluated(self, loss: float, min_delta: float) -> TrainState:
        """Return the state after an evaluation; a validation loss that is not finite is no improvement."""
        if math.isfinite(loss) and (self.improved_loss is None or loss < self.improved_loss - min_delta):
            return replace(self, improved_step=self.step, improved_loss=loss, num_without_improvement=0)
        return replace(self, num_without_improvement=self.num_without_improvement + 1)

    def saved_with(self, loss: float) -> TrainState:
        """Return the state with this step as the best one, where its validation loss is lower."""
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return self
        return replace(self, best_step=self.step, best_loss=loss)

    def stops_early(self, plan: RunPlan) -> bool:
        """Return whether the validation loss has ended training."""
        stopping = plan.recipe.evaluation.early_stopping
        return stopping is not None and self.num_without_improvement >= stopping.patience

    def early_stop_words(self, plan: RunPlan) -> str:
        """Return why training ended before the last step; empty if it did not."""
        stopping = plan.recipe.evaluation.early_stopping
        if stopping is None or not self.stops_early(plan):
            return ""
        ended = f"stopped early at step {self.step:,}: the validation loss has"
        if self.improved_loss is None:
            return f"{ended} never been finite"
        by = f" by more than {stopping.min_delta:g}" if stopping.min_delta else ""
        count, since = self.num_without_improvement, f"step {self.improved_step:,} ({self.improved_loss:.4f})"
        return f"{ended} not improved{by} in {count} evaluation{'s' * (count > 1)} since {since}"

    def is_trained(self, plan: RunPlan) -> bool:
        """Return whether no step is left to make, and no evaluation to repeat."""
        return (self.step == plan.num_steps or self.stops_early(plan)) and self.held_back is None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank.

    Random numbers (dropout) are therefore a function of the step, like the packs: a resumed run draws what an
    uninterrupted one would have drawn, and no generator state needs to be stored.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
