"""Early stopping and publishing the best checkpoint are refused where no validation loss could decide."""

import pytest

from packhorse.recipe.load import load_recipe

STOPPING = "evaluation.early_stopping={patience: 2}"
BEST = "checkpoint.publish=best"
MEASURED = ("evaluation.every_steps=50", "checkpoint.every_steps=25")


@pytest.mark.parametrize(
    "rows",
    [
        (),
        ("data.split={train: 0.8, test: 0.1}",),
        ("data.split={train: 0.9, validation: 0.1}",),
        ("data.validation=[{path: v}]",),
    ],
    ids=["drawn by number of rows", "the rest", "given share", "separate rows"],
)
def test_rows_that_are_drawn_or_named_are_enough(good, rows):
    recipe = load_recipe(good, (STOPPING, BEST, *MEASURED, *rows))
    assert recipe.evaluation.early_stopping.patience == 2
    assert recipe.checkpoint.publish == "best"


@pytest.mark.parametrize(
    ("overrides", "fact", "fix"),
    [
        ((STOPPING,), "early_stopping is set, and evaluation.every_steps is not", "set evaluation.every_steps"),
        ((BEST, "checkpoint.every_steps=5"), "best, and evaluation.every_steps is not", "set evaluation.every_steps"),
        ((STOPPING, *MEASURED, "data.split={train: 1}"), "has no validation rows", "validation: 0.1"),
        ((BEST, *MEASURED, "data.split={train: 0.9, test: 0.1}"), "has no validation rows", "validation: 0.1"),
        ((BEST, *MEASURED, "data.split={train: 0.9, validation: 0, test: 0.1}"), "no validation rows", "data.valid"),
        ((BEST, "evaluation.every_steps=50"), "checkpoint.every_steps is null", "set checkpoint.every_steps to 50"),
        ((BEST, *MEASURED, "checkpoint.every_steps=100"), "checkpoint.every_steps is 100", "every_steps to 50"),
        ((BEST, *MEASURED, "checkpoint.keep_best=false"), "checkpoint.keep_best is false", "keep_best to true"),
        ((BEST, *MEASURED, "checkpoint.on_full=continue"), "checkpoint.on_full is continue", "on_full to stop"),
        ((BEST, *MEASURED, "parallel={engine: zero3_nvme, nvme: /x}"), "engine is zero3_nvme", "zero3_offload"),
    ],
)
def test_mistakes(good, mistakes_of, overrides, fact, fix):
    (mistake,) = mistakes_of(good, *overrides)
    assert fact in mistake.fact
    assert fix in mistake.fix
