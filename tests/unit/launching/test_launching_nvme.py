"""`zero3_nvme` is refused before a row is read if its files, its I/O library or its buffers are not available."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.launching.preflight import check_nvme, check_resumable
from packhorse.plan.command import with_local_nvme
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.checkpoints.manifest import RunFacts, write_manifest

BUILDS, DOES_NOT_BUILD = "true", "false"  # compilers that only succeed, or fail


def plan(nvme: Path, model: str = "meta-llama/Llama-3.1-8B-Instruct") -> RunPlan:
    fields = {
        "name": "r",
        "model": {"id": model},
        "data": {"sources": [{"path": "r.jsonl"}]},
        "optimizer": {"learning_rate": 1e-4},
        "steps": 9,
        "parallel": {"engine": "zero3_nvme", "nvme": str(nvme)},
    }
    return make_plan(Recipe.model_validate(fields), DeviceRequest(gpus=8), Hardware(num_cores=4, gpus=()), None)


@pytest.fixture(autouse=True)
def _toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("include", "lib64"):
        (tmp_path / "cuda" / part).mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))


def test_a_machine_without_the_cuda_toolkit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", BUILDS)
    (tmp_path / "cuda" / "lib64").rmdir()
    with pytest.raises(UserError, match="this machine has no CUDA toolkit"):
        check_nvme(plan(tmp_path))


def test_a_buffer_holds_a_ranks_part_of_the_largest_weight(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.deepspeed is not None
    zero = made.deepspeed["zero_optimization"]
    embedding = 128_256 * 4_096  # Llama 3.1 8B, from its config.json
    assert embedding / 8 <= zero["offload_param"]["buffer_size"] <= embedding / 8 * 1.01
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == f"{tmp_path}/packhorse-r"


def test_a_machine_that_has_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", BUILDS)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_nvme(plan(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"parallel.nvme is .*file, and .* cannot be written: Not a directory"):
        check_nvme(plan(tmp_path / "file"))


def test_a_machine_without_the_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", DOES_NOT_BUILD)
    with pytest.raises(UserError, match="libaio-dev"):
        check_nvme(plan(tmp_path))


def test_too_little_memory_to_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", BUILDS)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * 2**20, 8 * 2**20))
    with pytest.raises(UserError, match=r"buffers of 657,326,080 bytes per process; 8,388,608 may be locked"):
        check_nvme(plan(tmp_path))


def test_the_folder_may_be_named_by_the_environment_of_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(Path("${env:LOCAL_DISK}"))
    assert "${env:LOCAL_DISK}" in made.model_dump_json()
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path))
    here = with_local_nvme(made).deepspeed
    assert here is not None
    assert here["zero_optimization"]["offload_param"]["nvme_path"] == f"{tmp_path}/packhorse-r"
    monkeypatch.delenv("LOCAL_DISK")
    with pytest.raises(UserError, match="LOCAL_DISK"):
        check_nvme(made)


def test_a_run_is_not_resumed_under_zero3_nvme(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="r would resume with parallel.engine zero3_nvme"):
        check_resumable(plan(tmp_path))


def test_a_checkpoint_of_zero3_nvme_is_not_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, RunFacts(step=2, engine="zero3_nvme", world_size=8, plan="p", data="d"), {})
    made = plan(tmp_path)
    topology = made.topology.model_copy(update={"engine": "ddp"})
    with pytest.raises(UserError, match="was written under zero3_nvme, and ddp would resume from it"):
        check_resumable(made.model_copy(update={"topology": topology, "run_folder": str(tmp_path)}))
