"""A run on soft CUDA that resumes from a checkpoint ends with the bits of one that was never stopped.

On a GPU sums by atomic operations may differ in their last bits from one run to the next (docs/checkpoints.md).
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from laboratory import Laboratory
from soft_runs import SoftCuda

from packhorse.run_folder.heartbeat import read_heartbeats


@pytest.mark.parametrize(
    ("method", "precision"), [("full", "bf16"), ("lora", "bf16"), ("nf4", "bf16"), ("full", "fp16")]
)
def test_resuming_from_step_2_gives_the_bits_of_the_unbroken_run(
    method: str, precision: str, cuda: SoftCuda, laboratory: Laboratory
) -> None:
    recipe = laboratory.recipe(method, "tiny", "none")
    run = cuda.trained(
        recipe, f"resumed-{method}-{precision}", f"precision={precision}", "steps=4", "checkpoint.every_steps=2"
    )
    unbroken = _bits(run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    for folder in ("model", "adapter"):
        shutil.rmtree(run / folder, ignore_errors=True)
    cuda.to_the_end(run, attempt=2)
    beats = read_heartbeats(run / "logs" / "attempt-2")
    assert [beat.first_step for beat in beats] == [2], "the second attempt began elsewhere"
    assert _bits(run) == unbroken


def _bits(run: Path) -> dict[str, str]:
    files = [*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")]
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
