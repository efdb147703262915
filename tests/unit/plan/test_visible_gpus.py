"""GPUs that CUDA would use: by number, by uuid, parts of a card, and where nvidia-smi is absent, slow or broken."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.plan import visible_gpus as module
from packhorse.plan.visible_gpus import visible_gpus

TWO = "echo 'GPU-aa11-2, NVIDIA A100-SXM4-80GB'\necho 'GPU-bb22-3, NVIDIA H100 80GB HBM3'"
A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
  strncpy(name, device ? "NVIDIA H100 80GB HBM3" : "NVIDIA A100-SXM4-80GB", length);
  return 0;
}
"""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, (A100, H100)),
        ("1", (H100,)),
        ("1,0", (H100, A100)),
        ("0,7,1", (A100,)),  # CUDA ignores all after the first number without a device
        ("", ()),
        ("GPU-bb22-3", (H100,)),
        ("GPU-bb", (H100,)),
        ("GPU-cc", ()),
        ("MIG-3f1c-5", ("MIG",)),
    ],
)
def test_cuda_visible_devices_chooses_as_in_cuda(
    visible: str | None,
    names: tuple[str, ...],
    write_nvidia_smi: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_nvidia_smi(TWO)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == names


def test_a_driver_that_does_not_answer_is_an_error_and_not_a_run_on_the_cpu(
    write_nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvidia_smi("exec sleep 9")
    monkeypatch.setattr(module, "SMI_SECONDS", 0.1)
    with pytest.raises(UserError, match="nvidia-smi does not answer"):
        visible_gpus()


def test_without_nvidia_smi_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine with a GPU has nvidia-smi beside cc
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))
    assert visible_gpus() == (A100, H100)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(f"/without/{name}"))
    assert visible_gpus() == ()
