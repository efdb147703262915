"""A disk that the checkpoints of a run would fill is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import EXIT_USER_ERROR, UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace, checkpoint_space
from packhorse.launching import preflight
from packhorse.launching.preflight import check_disk
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.schema import Recipe
from saving_cases import DATA, Trainer, make_run, save_at
from tiny import TINY

LLAMA = {**TINY["model"]["config"], "vocab_size": 512}


def plan_of(folder: Path, **sections: Any) -> RunPlan:
    model = {"config": LLAMA, "tokenizer": "builtin:tokenizer"}
    fields = {**TINY, "runs_folder": str(folder), "model": model, "steps": 10, **sections}
    return make_plan(Recipe.model_validate(fields), DeviceRequest(None), detect_hardware(), DATA)


def space_of(plan: RunPlan) -> CheckpointSpace:
    shape = read_shape(find_configuration(plan.recipe, 512))
    assert shape is not None
    room = checkpoint_space(plan, shape)
    assert room is not None
    return room


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    usage: Any = type("Usage", (), {"free": num_bytes})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)


@pytest.mark.parametrize(
    ("checkpoint", "count"),
    [
        ({"every_steps": 2}, 4),
        ({"every_steps": 2, "keep_last": 5, "keep_best": False}, 6),
        ({"every_steps": 6}, 3),
        ({}, 2),
    ],
    ids=["two, the best, the next", "more", "only two are made", "only the last"],
)
def test_all_checkpoints_on_disk_at_one_time_must_fit(
    checkpoint: dict[str, Any], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, checkpoint=checkpoint)
    room = space_of(plan)
    assert room.count == count
    free(monkeypatch, room.each_bytes * count)
    check_disk(plan, room)
    free(monkeypatch, room.each_bytes * count - 1)
    with pytest.raises(UserError, match=rf"are free in {tmp_path}, and the checkpoints need .*: {count} of ") as caught:
        check_disk(plan, room)
    assert caught.value.exit_code == EXIT_USER_ERROR


def test_existing_checkpoints_need_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_run(tmp_path))
    for step in (2, 4):
        save_at(trainer, step)
    plan = plan_of(tmp_path, checkpoint={"every_steps": 2})
    room = space_of(plan)
    free(monkeypatch, room.each_bytes * 2)
    check_disk(plan, room)
    free(monkeypatch, room.each_bytes * 2 - 1)
    with pytest.raises(UserError, match=": 2 of "):
        check_disk(plan, room)


def test_a_model_that_cannot_be_counted_ahead_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0)
    check_disk(plan_of(tmp_path), None)
