"""`packhorse tune`: what is tried, and what is advised from the measurements."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.cli import tune as command
from packhorse.errors import UserError
from packhorse.plan.topology import Hardware
from packhorse.recipe.schema import Recipe
from packhorse.workflows import tune as workflow
from packhorse.workflows.tune import Candidate, Trial, Tuning, default_candidates, tune

COMPILED, RECOMPUTED, FEWER, SDPA = (
    "parallel.compile=true",
    "parallel.checkpointing=true",
    "parallel.checkpointing=4",
    "model.attention=sdpa",
)


def recipe(**parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"id": "someone/model"},
            "data": {"sources": [{"path": "r.jsonl"}]},
            "optimizer": {"learning_rate": 1e-4},
            "steps": 9,
            "parallel": {"checkpointing": 2, **parallel},
        }
    )


def test_what_is_tried_differs_from_the_recipe() -> None:
    tried = [text for (text,) in default_candidates(recipe(), on_gpu=True)]
    assert tried == [COMPILED, "parallel.checkpointing=false", FEWER, RECOMPUTED, SDPA]
    assert default_candidates(recipe(compile="auto", checkpointing=True), on_gpu=False) == [
        ("parallel.compile=false",),
        ("parallel.checkpointing=false",),
    ]


SPEEDS: dict[Candidate, float] = {
    (): 100.0,
    (COMPILED,): 120.0,
    (FEWER,): 110.0,
    (RECOMPUTED,): 90.0,
    ("parallel.checkpointing=false",): 130.0,
    (SDPA,): 101.0,
}


def measured(
    monkeypatch: pytest.MonkeyPatch, speeds: dict[Candidate, float], other_loss: Candidate = ("none",)
) -> Tuning:
    def trial(_: Recipe, overrides: Candidate, *other: Any) -> tuple[Trial, int]:
        loss = 2.2 if overrides == other_loss else 2.0
        return Trial(overrides, speeds.get(overrides, 150.0), 1e9, 1.0, (3.0, loss)), 0

    monkeypatch.setattr(workflow, "_measured", trial)
    monkeypatch.setattr(workflow, "detect_hardware", lambda: Hardware(4, ("NVIDIA H100 80GB HBM3",)))
    return tune(recipe())


def test_the_fastest_value_of_each_field_is_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, SPEEDS)
    # 1 % faster is no gain, so attention stays.
    assert result.trials[-1].overrides == result.best == (COMPILED, "parallel.checkpointing=false")
    assert command.advice(result, "r.yaml", ["seed=1"]).endswith(
        "packhorse train r.yaml seed=1 parallel.compile=true parallel.checkpointing=false"
    )


def test_a_faster_candidate_with_another_loss_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, {**SPEEDS, ("parallel.checkpointing=false",): 95.0, (FEWER,): 95.0}, (COMPILED,))
    assert result.best == ()
    assert result.trials[1].loss_difference == pytest.approx(0.1)
    assert "train the recipe unchanged" in command.advice(result, "r.yaml", [])


def test_candidates_of_the_command_line() -> None:
    assert command.read_candidates("batch.micro=2+parallel.compile=true,seed=1") == [
        ("batch.micro=2", "parallel.compile=true"),
        ("seed=1",),
    ]
    with pytest.raises(UserError, match="--candidates names compile, which sets no field"):
        command.read_candidates("compile")
