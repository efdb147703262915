"""Rules on what the validation loss decides during training: when to stop, and which weights are the result."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.recipe.schema import Recipe
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.nodes import KeyPath

STOPPING: KeyPath = ("evaluation", "early_stopping")
PUBLISH: KeyPath = ("checkpoint", "publish")
EVERY: KeyPath = ("evaluation", "every_steps")
SAVES: KeyPath = ("checkpoint", "every_steps")


def validation_loss_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on early stopping and on publishing the best checkpoint that the recipe breaks."""
    if recipe.evaluation.early_stopping is not None:
        yield from _measured_rules(recipe, STOPPING, "evaluation.early_stopping is set")
    if recipe.checkpoint.publish == "best":
        yield from _measured_rules(recipe, PUBLISH, "checkpoint.publish is best")
        yield from _best_rules(recipe)


def _measured_rules(recipe: Recipe, path: KeyPath, fact: str) -> Iterator[Finding]:
    if recipe.evaluation.every_steps is None:
        yield Finding(
            (path,),
            f"{fact}, and evaluation.every_steps is not set.",
            "the validation loss is then measured only before the first and after the last step.",
            "set evaluation.every_steps, e.g. to a tenth of the steps",
        )
    if not _has_validation_rows(recipe):
        yield Finding(
            (path, ("data", "split")),
            f"{fact}, and the recipe has no validation rows.",
            "data.split gives them no share, and data.validation is empty, so that no validation loss is measured.",
            "set data.split to {train: 0.9, validation: 0.1}, or name rows in data.validation",
        )


def _best_rules(recipe: Recipe) -> Iterator[Finding]:
    section, every, fact = recipe.checkpoint, recipe.evaluation.every_steps, "checkpoint.publish is best"
    if every is not None and (section.every_steps is None or every % section.every_steps):
        saves = section.every_steps or "null"
        yield Finding(
            (PUBLISH, SAVES, EVERY),
            f"{fact}, evaluation.every_steps is {every}, and checkpoint.every_steps is {saves}.",
            "each step whose validation loss is measured needs a checkpoint, from which the best one is published.",
            f"set checkpoint.every_steps to {every}",
        )
    settings: tuple[tuple[KeyPath, str, bool, str, str], ...] = (
        (
            ("checkpoint", "keep_best"),
            "false",
            not section.keep_best,
            "a checkpoint that is not kept cannot be published.",
            "set checkpoint.keep_best to true",
        ),
        (
            ("checkpoint", "on_full"),
            "continue",
            section.on_full == "continue",
            "the best checkpoint could be one that a full disk did not take.",
            "set checkpoint.on_full to stop",
        ),
        (
            ("parallel", "engine"),
            "zero3_nvme",
            recipe.parallel.engine == "zero3_nvme",
            "weights that DeepSpeed keeps in files cannot be loaded from a checkpoint.",
            "set parallel.engine to zero3_offload, or checkpoint.publish to last",
        ),
    )
    for path, value, is_set, why, fix in settings:
        if is_set:
            yield Finding((PUBLISH, path), f"{fact}, and {'.'.join(map(str, path))} is {value}.", why, fix)


def _has_validation_rows(recipe: Recipe) -> bool:
    """Return whether rows are named for validation or drawn; without any share, some are always drawn."""
    split = recipe.data.split
    if recipe.data.validation:
        return True
    if split.validation is not None:
        return split.validation > 0
    return split.train is None or split.train + (split.test or 0) < 1  # an absent share is the rest
