"""What a plan reports of the teacher of a distillation: memory in its own phase or beside the student, time, disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.teacher import CHUNK_TOKENS, stored_bytes
from packhorse.launching import preflight
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import Shape, read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.replan import replan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.recipe.teacher import teacher_recipe
from packhorse.train.objectives import divergence

GIB = 2**30
QWEN3_8B = 8_190_735_360
LENGTH = 4096


def planned(engine: str, top: Any, data: DataFacts | None = None, teacher: dict[str, Any] | None = None) -> RunPlan:
    fields = {
        "name": "r",
        "model": {"id": "Qwen/Qwen3-0.6B"},
        "method": "full",
        "objective": {"kind": "distil", "teacher": teacher or {"id": "Qwen/Qwen3-8B"}, "top": top},
        "data": {"sources": [{"path": "r.jsonl"}]},
        "optimizer": {"learning_rate": 1e-5},
        "batch": {"length": LENGTH, "packs": 64, "micro": 1},
        "steps": 100,
        "parallel": {"engine": engine},
    }
    return make_plan(Recipe.model_validate(fields), DeviceRequest(gpus=8), Hardware(num_cores=8, gpus=()), data)


def shape_of(recipe: Recipe) -> Shape:
    shape = read_shape(find_configuration(recipe))
    assert shape is not None
    return shape


def estimate(plan: RunPlan, num_packs: int | None = None) -> PlanEstimate:
    packs = replace(PackFigures.full(LENGTH), num_packs=num_packs)
    shapes = [shape_of(recipe) for recipe in (plan.recipe, teacher_recipe(plan.recipe))]
    return PlanEstimate(plan, EstimateInputs(shapes[0], packs, find_gpu("H100"), teacher=shapes[1]))


def components(case: PlanEstimate, phase: str) -> dict[str, float]:
    return {part.name: part.bytes / GIB for part in case.memory.phase(phase).components}


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("zero1", 1), ("fsdp2", 8), ("zero3", 8)])
def test_a_stored_teacher_is_alone_in_memory_before_the_student(engine: str, ranks: int) -> None:
    case = estimate(planned(engine, 64))
    assert case.memory.phases[0].name == "teacher"
    assert components(case, "teacher")["weights"] == pytest.approx(2 * QWEN3_8B / ranks / GIB, rel=0.01)
    assert all("teacher" not in components(case, phase.name) for phase in case.memory.phases)


def test_a_resident_teacher_is_in_every_phase() -> None:
    stored, resident = (estimate(planned("ddp", top)) for top in (64, "all"))
    for phase in resident.memory.phases:
        assert components(resident, phase.name)["teacher"] == pytest.approx(2 * QWEN3_8B / GIB, rel=0.01)
        assert phase.bytes > stored.memory.phase(phase.name).bytes + 15 * GIB


def test_the_pass_takes_the_time_of_one_forward_pass_over_the_data() -> None:
    """6,400 packs of 4,096 tokens: 2 FLOPs for each weight and token, at 30 to 90 % of the GPUs' peak."""
    case = estimate(planned("ddp", 64), 6400)
    flops = 2 * (QWEN3_8B - 151_936 * 4096) * LENGTH * 6400  # without the embedding, which is looked up
    peak = 8 * 989e12
    assert flops / peak / 0.9 < case.speed.before_seconds < flops / peak / 0.3
    steps = 100 * case.speed.step_seconds
    assert case.speed.hours == pytest.approx((steps + case.speed.before_seconds) / 3600)


def test_a_resident_teacher_runs_in_every_step() -> None:
    stored, resident = (estimate(planned("ddp", top), 6400) for top in (64, "all"))
    per_step = stored.speed.before_seconds / 100
    assert resident.speed.before_seconds == 0
    assert resident.step_seconds - stored.step_seconds == pytest.approx(per_step, rel=0.02)


def test_chunks_are_those_of_the_loss() -> None:
    assert CHUNK_TOKENS == divergence.CHUNK_TOKENS


def test_a_disk_that_the_tokens_would_fill_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 million supervised tokens x 64 x (4 + 2) bytes."""
    facts = DataFacts(
        folder=str(tmp_path),
        content_hash="0",
        tokenizer="t",
        num_rows=1,
        num_packs=64,
        num_tokens=10**7,
        num_supervised_tokens=10**7,
        fill=1.0,
    )
    plan = planned("ddp", 64, facts)
    assert stored_bytes(plan) == 3_840_000_000
    assert stored_bytes(planned("ddp", "all", facts)) == 0
    usage = preflight.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=3_900_000_000))
    preflight.check_teacher_disk(plan, None)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=3_800_000_000))
    with pytest.raises(UserError, match=r"3.8 GB are free.* tokens need 3.8 GB") as refused:
        preflight.check_teacher_disk(plan, None)
    assert "free 40.0 MB there" in str(refused.value)
    preflight.check_teacher_disk(planned("ddp", "all", facts), None)


def test_a_folder_without_a_teacher_is_refused(tmp_path: Path) -> None:
    plan = planned("ddp", 64, teacher={"path": str(tmp_path)})
    with pytest.raises(UserError, match="holds no config.json"):
        preflight.check_teacher_folder(plan)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    preflight.check_teacher_folder(plan)
    with pytest.raises(UserError, match="does not exist"):
        preflight.check_teacher_folder(planned("ddp", 64, teacher={"path": str(tmp_path / "none")}))


def test_a_resumed_run_keeps_the_teacher_of_its_first_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's path is relative to the folder where the run was planned."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plan = planned("ddp", 64, teacher={"path": "big"})
    monkeypatch.chdir(tmp_path)
    again = replan(plan, ("parallel.engine=fsdp2",), DeviceRequest(gpus=8), Hardware(num_cores=8, gpus=()), 0)
    assert again.topology.engine == "fsdp2"
    assert again.teacher == plan.teacher
    assert again.teacher.model.path == str(tmp_path / "here" / "big")
