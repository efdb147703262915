from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.inputs import check_inputs, weights_fault
from packhorse.doctor.machine import file_system, gpu_facts, resource_facts, torch_built_for, versions

SMI = """echo '0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 4'
echo '1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 20000'"""


def test_versions_are_those_that_are_imported() -> None:
    found = versions()
    assert {"python", "packhorse", "torch", "accelerate", "transformers"} <= set(found)
    import accelerate

    assert found["accelerate"] == accelerate.__version__


def test_the_first_of_two_installations_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "transformers-4.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions()["transformers"] == "4.0.0"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("GPU-bbbb", ["1"]),
        ("0,7,1", ["0"]),
        ("", []),
        ("MIG-cc", ["MIG-cc"]),
    ],
)
def test_gpus_that_the_job_may_see(
    visible: str | None,
    indices: list[str],
    write_nvidia_smi: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_nvidia_smi(SMI)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpu_facts()
    assert [gpu.index for gpu in found.gpus] == indices
    assert (found.installed, found.error) == (2, "")
    assert [gpu.used_mib for gpu in found.gpus if gpu.index == "1"] == [20000] * ("1" in indices)


def test_an_error_of_nvidia_smi_is_reported(write_nvidia_smi: Callable[[str], None]) -> None:
    write_nvidia_smi("echo 'Unable to determine the device handle for GPU 0000:4E:00.0: Unknown Error'; exit 9")
    assert "failed with exit code 9: Unable to determine the device handle" in gpu_facts().error


def test_cuda_of_torch_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert torch_built_for("cuda") == (torch.version.cuda or "")
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError\n")
    (package / "version.py").write_text("__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\nhip = None\n")
    monkeypatch.delitem(__import__("sys").modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert (torch_built_for("cuda"), torch_built_for("hip")) == ("12.8", "")


def test_file_system_of_a_path(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nnfs:/x {tmp_path} nfs4 rw 0 0\nnfs:/y {tmp_path}/run lustre rw 0 0\n")
    kinds = [file_system(tmp_path / name, mounts) for name in ("runs", "run", "run/first", "..")]
    assert kinds == ["nfs4", "lustre", "lustre", "ext4"]


def test_scratch_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in resource_facts(str(tmp_path / "file" / "scratch")).scratch_error
    assert "NO_SUCH_VARIABLE is not set" in resource_facts("${env:NO_SUCH_VARIABLE}").scratch_error
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = resource_facts("")
    assert (found.scratch, found.scratch_error) == (str(tmp_path), "")
    assert found.scratch_free_bytes > 0


def test_incomplete_weights(tmp_path: Path) -> None:
    assert weights_fault(tmp_path) == f"{tmp_path} has no config.json"
    (tmp_path / "config.json").write_text("{}")
    assert weights_fault(tmp_path) == f"{tmp_path} has no weights"
    (tmp_path / "model-1.safetensors").touch()
    assert weights_fault(tmp_path) == ""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    # A file of the hub's cache is a link, which stays when what it leads to is gone.
    (tmp_path / "model-2.safetensors").symlink_to(tmp_path / "gone")
    assert weights_fault(tmp_path) == f"{tmp_path} lacks 1 of 2 weight files: model-2.safetensors"
    index.write_text("{")
    assert "cannot be read" in weights_fault(tmp_path)


def test_a_variable_in_the_models_path_is_the_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = DoctorRequest(
        num_nodes=1, gpus_per_node=0, folder=str(tmp_path), token="0", model_folder="${env:MODELS}/base"
    )
    monkeypatch.delenv("MODELS", raising=False)
    assert "MODELS is not set" in check_inputs(1, request).model_fault
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert check_inputs(1, request).model_fault == f"{tmp_path}/base has no config.json"


def test_missing_inputs_are_found_without_the_hub(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    request = DoctorRequest(num_nodes=1, gpus_per_node=0, folder=str(tmp_path), token="0", fast=True)
    found = check_inputs(0, request.model_copy(update={"model_id": "org/nothing", "data_folder": str(data)}))
    assert "org/nothing is not in " in found.model_fault
    assert found.data_fault == f"{data} has no prepared data"
