"""A sweep: its runs, and what is refused before a job is queued."""

from __future__ import annotations

import pytest

from packhorse.cli.train import train
from packhorse.errors import UserError
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import as_typed, expand, is_sweep
from packhorse.yaml_source.nodes import plain
from packhorse.yaml_source.overrides import parse_override

GRID = 'sweep.grid={"optimizer.learning_rate": [1e-4, 3e-4], seed: [1, 2, 3]}'


def test_a_grid_has_a_run_for_each_combination_with_a_name_of_its_own(good: str) -> None:
    runs = expand(load_recipe(good, [GRID]))
    found = [(run.recipe.name, run.recipe.optimizer.learning_rate, run.recipe.seed) for run in runs]
    assert found == [(f"good-{1 + 3 * i + j}", rate, 1 + j) for i, rate in enumerate([1e-4, 3e-4]) for j in range(3)]
    assert runs[3].overrides == ("optimizer.learning_rate=0.0003", "seed=1")
    assert not any(is_sweep(run.recipe) for run in runs)


def test_runs_are_taken_as_they_stand_and_sections_are_joined(good: str) -> None:
    base = ["batch.length=512", "sweep.runs=[{batch: {packs: 4}, seed: 1}, {batch.packs: 8}]"]
    first, second = expand(load_recipe(good, base))
    assert (first.recipe.batch.packs, first.recipe.batch.length, first.recipe.seed) == (4, 512, 1)
    assert (second.recipe.batch.packs, second.recipe.batch.length, second.recipe.seed) == (8, 512, 42)


def test_a_grid_can_be_given_field_by_field_on_the_command_line(good: str) -> None:
    runs = expand(load_recipe(good, ["sweep.grid.optimizer.learning_rate=[1e-3, 1e-4]"]))
    assert [run.recipe.optimizer.learning_rate for run in runs] == [1e-3, 1e-4]


@pytest.mark.parametrize(
    "value", ["plain", "123", "", " a", '"q', "[x", "null", "a: b # c", 1e-7, True, None, [1, "2"], {"a": "b c"}]
)
def test_every_value_is_typed_so_that_it_is_read_as_the_same(value: object) -> None:
    assert plain(parse_override(f"key={as_typed(value)}").node) == value


@pytest.mark.parametrize(
    ("sweep", "fact"),
    [
        ("{grid: {seed: [1]}, runs: [{seed: 1}]}", "sweep gives grid and runs at once."),
        ("{grid: {seed: 3}}", "sweep.grid.seed is 3."),
        ("{grid: {seed: []}}", "sweep.grid.seed is []."),
        ("{grid: {seed: [1, 1]}}", "sweep.grid.seed has a value twice."),
        ("{grid: {name: [a, b]}}", "sweep varies name."),
        ("{runs: [{runs_folder: x}]}", "sweep varies runs_folder."),
        ("{runs: [{seed: 1}, {seed: 1}]}", "sweep.runs.1 is the same as sweep.runs.0."),
        ("{runs: [{}]}", "sweep.runs.0 is empty."),
        (f"{{grid: {{seed: {list(range(50))}, steps: {list(range(1, 22))}}}}}", "sweep.grid has 50 x 21 = 1,050 runs."),
    ],
)
def test_a_sweep_without_different_runs_is_refused(good: str, mistakes_of, sweep: str, fact: str) -> None:
    assert [mistake.fact for mistake in mistakes_of(good, f"sweep={sweep}")] == [fact]


def test_a_mistake_in_one_run_names_the_value_and_is_reported_once(good: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(load_recipe(good, ["sweep.grid={optimizer.lr: [1], seed: [1, 2], batch.packs: [2, -1]}"]))
    facts = [f"{mistake.where}: {mistake.fact}" for mistake in caught.value.mistakes]
    assert len(facts) == 2
    assert "override optimizer.lr=1: optimizer.lr is not a field of optimizer." in facts[0]
    assert "override batch.packs=-1: batch.packs is -1" in facts[1]


def test_train_refuses_a_sweep_and_says_how_to_train_one_of_its_runs(good: str, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        train(good, [GRID], None, resume=False)
    assert "good has a sweep of 6 runs, and this command trains one run." in str(caught.value)
    one = "packhorse train my.yaml 'sweep={}' name=good-1 optimizer.learning_rate=0.0001 seed=1"
    assert f"`packhorse submit my.yaml`, or one with `{one}`" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_summary_names_every_run(good: str) -> None:
    lines = dict(summary(load_recipe(good, ["sweep.grid.seed=[1, 2]"])))
    assert lines["sweep"] == "2 runs: 1: seed=1; 2: seed=2"
    assert "sweep" not in dict(summary(load_recipe(good)))
