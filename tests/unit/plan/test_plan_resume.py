"""A run's plan for other processes, another engine or smaller passes: the maths stay, the earlier plan is kept."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import EXIT_DISK, UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.replan import replace_plan, replan, with_smaller_micro
from packhorse.plan.run_plan import DataFacts, RunPlan, read_plan, write_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

FOUR = Hardware(num_cores=96, gpus=("H100",) * 4)
TWO = Hardware(num_cores=96, gpus=("H100",) * 2)
DATA = DataFacts(
    folder="/d",
    content_hash="0" * 16,
    tokenizer="t",
    num_rows=9,
    num_packs=100,
    num_tokens=9,
    num_supervised_tokens=9,
    fill=1.0,
)


def plan(folder: Path, **sections: Any) -> RunPlan:
    fields: dict[str, Any] = {
        "name": "r",
        "runs_folder": str(folder),
        "model": {"id": "o/m"},
        "method": "full",
        "data": {"sources": [{"path": "r.jsonl"}]},
        "batch": {"packs": 16, "length": 1024},
        "epochs": 2,
        "optimizer": {"learning_rate": 1e-4},
    }
    return make_plan(Recipe.model_validate(fields | sections), DeviceRequest(), FOUR, DATA)


def test_fewer_gpus_share_the_same_step(tmp_path: Path) -> None:
    before = plan(tmp_path)
    after = replan(before, [], DeviceRequest(gpus=2), TWO, attempt=3)
    assert (before.topology.world_size, after.topology.world_size) == (4, 2)
    assert after.batch.packs_per_step == before.batch.packs_per_step
    assert 2 * after.batch.micro_packs * after.batch.accumulation_steps == 16
    assert (after.num_steps, after.data, after.base_model) == (before.num_steps, before.data, before.base_model)
    assert after.argv[after.argv.index("--num_processes") + 1] == "2"
    assert after.decisions[-1].reason == "after attempt 3: processes 4 -> 2"


def test_another_engine_brings_its_configuration(tmp_path: Path) -> None:
    before = plan(tmp_path)
    after = replan(before, ["parallel.engine=zero3"], DeviceRequest(), FOUR, attempt=1)
    assert before.deepspeed is None
    assert after.deepspeed is not None
    assert after.deepspeed["zero_optimization"]["stage"] == 3
    assert "zero3.yaml" in " ".join(after.argv)
    again = replan(after, ["parallel.engine=ddp", "parallel.processes=1"], DeviceRequest(), FOUR, attempt=2)
    assert again.deepspeed is None
    assert [d.value for d in again.decisions if d.name == "resume"] == ["zero3, 4 processes", "ddp, 1 process"]


def test_processes_stay_unless_requested(tmp_path: Path) -> None:
    """`auto` would mean two here."""
    before = plan(tmp_path)
    after = replan(before, ["checkpoint.keep_last=5"], DeviceRequest(), TWO, attempt=1)
    assert after.topology == before.topology
    assert after.recipe.checkpoint.keep_last == 5
    assert replan(before, [], DeviceRequest(), TWO, attempt=1) is before
    assert replan(before, ["checkpoint.keep_last=2"], DeviceRequest(), TWO, attempt=1) is before


def test_a_run_that_was_moved_stays_where_it_is(tmp_path: Path) -> None:
    moved = plan(tmp_path).model_copy(update={"run_folder": str(tmp_path / "elsewhere")})
    after = replan(moved, ["batch.micro=1"], DeviceRequest(), FOUR, attempt=1)
    assert after.run_folder == moved.run_folder
    assert after.argv[-1] == str(tmp_path / "elsewhere" / "plan.json")
    assert after.batch.accumulation_steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate=1e-3"),
        ("batch.packs=8", "batch.packs=8"),
        ("seed=1", "seed=1"),
        ("parallelism=2", "parallelism=2"),
        ("parallel.processes=17", "batch.packs is 16, and there are 17 processes"),
        ("parallel.engin=zero2", "engin"),
        ("parallel.engine=single", "single, and the run has 4 processes"),
    ],
)
def test_other_maths_and_too_few_packs_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        replan(plan(tmp_path), [override], DeviceRequest(), FOUR, attempt=1)


def test_half_the_packs_in_a_pass_take_twice_the_passes(tmp_path: Path) -> None:
    before = plan(tmp_path, parallel={"engine": "zero2"})
    assert (before.batch.micro_packs, before.batch.accumulation_steps) == (4, 1)
    sizes = []
    smaller: RunPlan | None = before
    while smaller is not None:
        sizes.append((smaller.batch.micro_packs, smaller.batch.accumulation_steps))
        assert smaller.deepspeed is not None
        assert smaller.deepspeed["gradient_accumulation_steps"] == smaller.batch.accumulation_steps
        last, smaller = smaller, with_smaller_micro(smaller)
    assert sizes == [(4, 1), (2, 2), (1, 4)]
    assert last.recipe.batch.micro == 1
    assert last.chosen("batch.micro") == "1 packs per pass, 4 passes per step"


def test_a_weight_that_is_stepped_in_the_only_pass_needs_it_whole(tmp_path: Path) -> None:
    one = plan(
        tmp_path,
        parallel={"engine": "single", "processes": 1},
        batch={"packs": 4, "length": 1024},
        optimizer={"learning_rate": 1e-4, "in_backward": True, "clip_norm": None},
    )
    assert one.batch.micro_packs == 4
    assert with_smaller_micro(one) is None


def test_earlier_plans_are_kept(tmp_path: Path) -> None:
    first = plan(tmp_path)
    folder = Path(first.run_folder)
    folder.mkdir(parents=True)
    write_plan(first, folder)
    second = replan(first, [], DeviceRequest(gpus=2), FOUR, attempt=1)
    third = replan(second, [], DeviceRequest(gpus=1), FOUR, attempt=2)
    assert [replace_plan(each).name for each in (second, third)] == ["plan-1.json", "plan-2.json"]
    assert [read_plan(folder / name) for name in ("plan-1.json", "plan-2.json", "plan.json")] == [first, second, third]
    assert {path.name for path in folder.iterdir()} == {"plan.json", "plan-1.json", "plan-2.json"}


def test_if_the_disk_refuses_the_earlier_plan_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(tmp_path)
    folder = Path(first.run_folder)
    folder.mkdir(parents=True)
    write_plan(first, folder)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("packhorse.durable.sync_to_disk", full)
    with pytest.raises(UserError, match="No space left") as refused:
        replace_plan(replan(first, [], DeviceRequest(gpus=2), FOUR, attempt=1))
    assert refused.value.exit_code == EXIT_DISK
    assert read_plan(folder) == first
    assert {path.name for path in folder.iterdir()} == {"plan.json"}
