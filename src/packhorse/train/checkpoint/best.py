"""Publishes the result of a run: the weights of the last step, or of the checkpoint with the lowest validation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER, step_folder_name
from packhorse.run_folder.result import Result
from packhorse.train.checkpoint.master_weights import load_saved_weights
from packhorse.train.checkpoint.weights import publish_result, unwrapped, weights_folder_name
from packhorse.train.engine.engine import Engine
from packhorse.train.ranks.agreement import agreed_failure
from packhorse.train.state import TrainState


def publish(plan: RunPlan, engine: Engine, state: TrainState, tokenizer: Any, is_main: bool) -> None:  # noqa: ANN401
    """Publish the weights that `checkpoint.publish` chooses; a collective, after which the model trains no more.

    Raises:
        UserError: The best checkpoint is missing or damaged, the disk refuses, or the written files are damaged.
    """
    choice, step, loss = plan.recipe.checkpoint.publish, state.step, None
    if choice == "best":
        step, loss = _load_best(plan, engine, state, is_main), state.best_loss
    result = Result(step=step, last_step=state.step, publish=choice, validation_loss=loss)
    publish_result(plan, engine, tokenizer, result, is_main)


def _load_best(plan: RunPlan, engine: Engine, state: TrainState, is_main: bool) -> int:
    """Load the weights of the best checkpoint where the model has others; return its step."""
    if state.best_step == state.step:
        return state.step
    error: UserError | None = None
    name, folder = weights_folder_name(plan), Path(plan.run_folder) / CHECKPOINTS_FOLDER
    if state.best_step is None:
        error = _unpublished(plan, "no validation loss was finite")
    elif is_main and (fault := next(checkpoint_faults(folder / step_folder_name(state.best_step), name), None)):
        error = _unpublished(plan, f"{folder.name}/{fault.removesuffix('.')}")
    failure = agreed_failure(engine, error)
    if failure is not None:
        raise failure
    assert state.best_step is not None
    checkpoint = folder / step_folder_name(state.best_step)
    load_saved_weights(unwrapped(engine), checkpoint / name, plan.recipe.model.trust_remote_code)
    return state.best_step


def _unpublished(plan: RunPlan, reason: str) -> UserError:
    return UserError(
        f"the best checkpoint cannot be published: {reason}.",
        "checkpoint.publish is best, and training has ended.",
        f"publish the last weights: packhorse resume {relative(plan.run_folder)} checkpoint.publish=last",
    )
