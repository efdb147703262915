"""How much room the checkpoints of a run take, counted before anything is loaded; or not said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from packhorse.plan.architectures import find_configuration
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.trainable import count_parameters
from packhorse.recipe.schema import OptimizerName

WEIGHT_BYTES: Final = 4
"""Weights are kept in float32, as they are trained."""

STATE_BYTES: Final[Mapping[OptimizerName, float]] = {
    "adamw": 8.0,
    "paged_adamw": 8.0,
    "adamw_8bit": 2 * (1 + 4 / 256),  # a scale for each 256
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "lion": 4.0,
    "lion_8bit": 1 + 4 / 256,
    "muon": 8.0,  # at most: its matrices have one momentum, the rest AdamW's two
    "adafactor": 0.0,  # a figure a row and a column
}
"""Bytes that each optimizer keeps for a trained weight."""


@dataclass(frozen=True)
class CheckpointRoom:
    """Room for the checkpoints of a run.

    Attributes:
        each_bytes: Of one, but for small files.
        count: How many stand at once, the one that is being written too.
    """

    each_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return self.each_bytes * self.count


def checkpoint_room(plan: RunPlan, vocab_size: int | None) -> CheckpointRoom | None:
    """Counts it; None where the model's parameters cannot be counted ahead (`trainable.count_parameters`).

    Args:
        plan: Its recipe, and its steps where they are known.
        vocab_size: Size of the tokenizer, which a fresh model takes.
    """
    recipe = plan.recipe
    if recipe.model.new_tokens:
        return None
    counts = count_parameters(find_configuration(recipe, vocab_size), recipe.method)
    if counts is None:
        return None
    kept = counts.base if recipe.method.trains_base else counts.trainable
    each = kept * WEIGHT_BYTES + math.ceil(counts.trainable * STATE_BYTES[recipe.optimizer.name])
    return CheckpointRoom(each, _most_at_once(plan))


def _most_at_once(plan: RunPlan) -> int:
    section = plan.recipe.checkpoint
    kept = section.keep_last + section.keep_best
    if section.every_steps is None:
        kept = 1  # that of the end, or of a stop
    elif plan.num_steps is not None:
        kept = min(kept, math.ceil(plan.num_steps / section.every_steps))
    return kept + 1
