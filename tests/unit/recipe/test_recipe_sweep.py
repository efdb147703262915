"""A sweep: its runs, and what is refused before a job is queued."""

from __future__ import annotations

import pytest

from packhorse.errors import UserError
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import as_typed, expand, is_sweep
from packhorse.workflows.new_run import load_single
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


def test_folds_are_runs_alone_and_of_each_combination(good: str) -> None:
    runs = expand(load_recipe(good, ["sweep.folds=3"]))
    assert [(run.recipe.name, run.recipe.data.split.fold) for run in runs] == [
        (f"good-fold-{n}", (n, 3)) for n in (1, 2, 3)
    ]
    runs = expand(load_recipe(good, ["sweep={folds: 2, grid: {seed: [7, 8]}}"]))
    assert [(run.recipe.name, run.recipe.seed, run.recipe.data.split.fold) for run in runs] == [
        ("good-1", 7, (1, 2)),
        ("good-2", 7, (2, 2)),
        ("good-3", 8, (1, 2)),
        ("good-4", 8, (2, 2)),
    ]


def test_random_search_repeats_its_draws_and_covers_a_range_by_orders_of_magnitude(good: str) -> None:
    fields = "fields: {optimizer.learning_rate: {low: 1e-6, high: 1e-2, log: true}, seed: {low: 1, high: 4}}"
    runs = expand(load_recipe(good, [f"sweep={{random: {{draws: 400, {fields}}}}}"]))
    again = expand(load_recipe(good, [f"sweep={{random: {{draws: 40, {fields}}}}}"]))
    other = expand(load_recipe(good, [f"sweep={{random: {{draws: 40, seed: 1, {fields}}}}}"]))
    assert [run.overrides for run in runs[:40]] == [run.overrides for run in again]
    assert [run.overrides for run in other] != [run.overrides for run in again]
    rates = [run.recipe.optimizer.learning_rate for run in runs]
    assert min(rates) >= 1e-6
    assert max(rates) <= 1e-2
    # 100 of 400 are expected in each decade, give or take 4 standard deviations (35).
    assert all(65 < sum(10.0**e <= rate < 10.0 ** (e + 1) for rate in rates) < 135 for e in (-6, -5, -4, -3))
    assert all(65 < sum(run.recipe.seed == seed for run in runs) < 135 for seed in (1, 2, 3, 4))


def test_random_search_gives_each_run_once(good: str) -> None:
    runs = expand(load_recipe(good, ["sweep.random={draws: 6, fields: {seed: [1, 2, 3], batch: {packs: [2, 4]}}}"]))
    assert {(run.recipe.seed, run.recipe.batch.packs) for run in runs} == {(s, p) for s in (1, 2, 3) for p in (2, 4)}
    with pytest.raises(UserError, match=r"sweep.random.draws is 7, and sweep.random.fields give 6 different runs"):
        expand(load_recipe(good, ["sweep.random={draws: 7, fields: {seed: [1, 2, 3], batch.packs: [2, 4]}}"]))


@pytest.mark.parametrize(
    "value", ["plain", "123", "", " a", '"q', "[x", "null", "a: b # c", 1e-7, True, None, [1, "2"], {"a": "b c"}]
)
def test_every_value_is_typed_so_that_it_is_read_as_the_same(value: object) -> None:
    assert plain(parse_override(f"key={as_typed(value)}").node) == value


@pytest.mark.parametrize(
    ("sweep", "fact"),
    [
        ("{grid: {seed: [1]}, runs: [{seed: 1}]}", "sweep gives grid and runs at once."),
        ("{random: {draws: 2, fields: {seed: 3}}}", "sweep.random.fields.seed is 3."),
        ("{random: {draws: 2, fields: {seed: {low: 0, high: 9, log: true}}}}", 'sweep.random.fields.seed is {"low": 0'),
        ("{random: {draws: 2, fields: {}}}", "sweep.random.fields is empty."),
        ("{random: {draws: 2, fields: {name: [a]}}}", "sweep varies name."),
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
    (mistake,) = mistakes_of(good, f"sweep={sweep}")
    assert mistake.fact.startswith(fact)


def test_folds_that_no_run_could_hold_out_are_refused(good: str, mistakes_of) -> None:
    facts = [mistake.fact for mistake in mistakes_of(good, "sweep.folds=5", "data.split.fold=[6, 5]")]
    assert facts == ["data.split.fold is [6, 5].", "sweep.folds is 5, and data.split.fold is [6, 5]."]
    (mistake,) = mistakes_of(good, "sweep.folds=5", "data.validation=[{path: v.jsonl}]")
    assert mistake.fact == "sweep.folds is set, and data.validation names rows."


def test_a_mistake_in_one_run_names_the_value_and_is_reported_once(good: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(load_recipe(good, ["sweep.grid={optimizer.lr: [1], seed: [1, 2], batch.packs: [2, -1]}"]))
    facts = [f"{mistake.where}: {mistake.fact}" for mistake in caught.value.mistakes]
    assert len(facts) == 2
    assert "override optimizer.lr=1: optimizer.lr is not a field of optimizer." in facts[0]
    assert "override batch.packs=-1: batch.packs is -1" in facts[1]


def test_a_command_for_one_run_refuses_a_sweep_and_names_the_commands(good: str) -> None:
    with pytest.raises(UserError) as caught:
        load_single(good, [GRID])
    assert "good has a sweep of 6 runs, and this command trains one run." in str(caught.value)
    one = "packhorse train my.yaml 'sweep={}' name=good-1 optimizer.learning_rate=0.0001 seed=1"
    assert f"`packhorse train my.yaml` or `packhorse submit my.yaml`, or one with `{one}`" in str(caught.value)


def test_the_summary_names_every_run(good: str) -> None:
    lines = dict(summary(load_recipe(good, ["sweep.grid.seed=[1, 2]"])))
    assert lines["sweep"] == "2 runs: 1: seed=1; 2: seed=2"
    assert "sweep" not in dict(summary(load_recipe(good)))
