"""Rules between the fields of `recovery`, `checkpoint` and `optimizer`: what a run could not do when it has to."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.recipe.findings import Finding
from packhorse.recipe.schema import Recipe


def recovery_rules(recipe: Recipe) -> Iterator[Finding]:
    """Steps that cannot be left out, and rewinds that have nowhere to go."""
    recovery = recipe.recovery
    if recovery.on_nonfinite == "skip" and recipe.optimizer.in_backward:
        yield Finding(
            (("recovery", "on_nonfinite"), ("optimizer", "in_backward")),
            "recovery.on_nonfinite is skip, and optimizer.in_backward is true.",
            "the first weights are stepped before it is known that the gradient is no number.",
            "set recovery.on_nonfinite to stop, or optimizer.in_backward to false",
        )
    if recovery.on_spike == "rewind":
        yield from _rewind_rules(recipe)


def _rewind_rules(recipe: Recipe) -> Iterator[Finding]:
    recovery, checkpoint = recipe.recovery, recipe.checkpoint
    back, every = recovery.rewind_steps, checkpoint.every_steps
    if every is None:
        yield Finding(
            (("recovery", "on_spike"), ("checkpoint", "every_steps")),
            "recovery.on_spike is rewind, and checkpoint.every_steps is not given.",
            "each rewind would begin again at step 0.",
            "set checkpoint.every_steps, or recovery.on_spike to warn",
        )
    elif (checkpoint.keep_last - 1) * every < back - 1:
        yield Finding(
            (("recovery", "rewind_steps"), ("checkpoint", "keep_last"), ("checkpoint", "every_steps")),
            f"recovery.rewind_steps is {back}, and of the checkpoints each {every} steps the last "
            f"{checkpoint.keep_last} are kept.",
            "all of them could be younger than the step that a rewind goes back to; it would begin again at step 0.",
            f"set checkpoint.keep_last to {1 - (1 - back) // every} or more, or checkpoint.every_steps higher",
        )
    if recovery.most_left_out < back:
        yield Finding(
            (("recovery", "most_left_out"), ("recovery", "rewind_steps")),
            f"recovery.rewind_steps is {back}, and recovery.most_left_out is {recovery.most_left_out}.",
            "the first rewind would leave out more steps than may be, and end the run.",
            f"set recovery.most_left_out to {back} or more",
        )
