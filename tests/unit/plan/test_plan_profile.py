"""A window of the profiler that lies beyond the run is refused by `check`, with one that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.plan.run_plan import DataFacts
from packhorse.recipe.load import load_recipe
from packhorse.workflows.early_checks import plan_on_some_machine
from tiny import write_tiny

PACKS = DataFacts(
    folder="", content_hash="", tokenizer="t", num_rows=9, num_packs=40, num_tokens=9, num_supervised_tokens=9, fill=1
)


@pytest.mark.parametrize(
    ("words", "fact", "fix"),
    [
        (["steps=12"], "track.profile.steps is [10, 13], and the run has 12 steps.", "to [9, 12]."),
        (["steps=2"], "the run has 2 steps.", "to [1, 2]."),
        (["epochs=2"], "the run has 10 steps.", "to [7, 10]."),
        (["steps=20", "track.profile.steps=[13, 10]"], "track.profile.steps is [13, 10].", "to [10, 13]."),
    ],
    ids=["steps", "few steps", "epochs", "order"],
)
def test_a_window_beyond_the_run_is_refused(words: list[str], fact: str, fix: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(write_tiny(tmp_path)), ["track.profile={steps: [10, 13]}", *words])
    with pytest.raises(UserError) as caught:
        plan_on_some_machine(recipe, PACKS)
    assert fact in str(caught.value)
    assert fix in str(caught.value)


def test_the_last_steps_of_a_run_can_be_profiled(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_tiny(tmp_path, steps=13)), ["track.profile={steps: [10, 13]}"])
    assert plan_on_some_machine(recipe, None).recipe.track.profile == recipe.track.profile
    once = load_recipe(str(write_tiny(tmp_path, steps=13)), ["track.profile={steps: [10, 13]}", "epochs=1"])
    plan_on_some_machine(once, None)  # its steps are not known yet
