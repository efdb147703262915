"""An out-of-memory error names the micro-batch, its row lengths and a change that helps; other errors do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packhorse.data.packs.loader import MicroBatch, lay_out
from packhorse.errors import EXIT_MEMORY
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import Prediction, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.train.guard.memory_error import is_out_of_memory, memory_error, note_micro_batch
from packhorse.train.ranks.attempt import AnotherAttempt
from tiny import TINY

GIB = 2**30
GPU_SAYS = "CUDA out of memory. Tried to allocate 20.00 GiB."
LAST = Heartbeat(rank=3, pid=1, host="h", phase="backward", step=6, since=0.0, at=0.0)


def plan(micro: int, on_oom: str) -> RunPlan:
    sections: dict[str, Any] = {"batch": {"length": 256, "packs": 8, "micro": micro}, "recovery": {"on_oom": on_oom}}
    return make_plan(Recipe.model_validate(TINY | sections), DeviceRequest(), Hardware(num_cores=2, gpus=()), None)


def micro_batch(*lengths: int) -> MicroBatch:
    parts = [torch.arange(length).numpy() for length in lengths]
    return lay_out(parts, [part * 0 + 1 for part in parts])


def caught(error: RuntimeError, batch: MicroBatch) -> RuntimeError:
    with pytest.raises(RuntimeError) as info, note_micro_batch(batch, 2, 4):
        raise error
    return info.value


def test_the_error_names_the_step_the_rows_and_the_smallest_change() -> None:
    error = caught(torch.OutOfMemoryError(GPU_SAYS + "\nstate of the allocator"), micro_batch(7, 200, 30))
    error_shown = memory_error(plan(2, "stop"), LAST, error)
    assert error_shown.exit_code == EXIT_MEMORY
    assert not isinstance(error_shown, AnotherAttempt)
    (mistake,) = error_shown.mistakes
    assert mistake.fact == (
        "rank 3 ran out of memory at step 7, phase backward, micro-batch 2 of 4: 237 tokens in 3 rows (200, 30, 7)."
    )
    assert mistake.why == GPU_SAYS
    assert mistake.fix.startswith("set batch.micro to 1: 8 passes per step")


def test_the_error_names_the_plan_s_prediction() -> None:
    predicted = Prediction(gpu="A10-24GB", memory_bytes=24 * GIB, required_bytes=18 * GIB, phase="loss", step_seconds=1)
    error_shown = memory_error(
        plan(1, "stop").model_copy(update={"predicted": predicted}), LAST, torch.OutOfMemoryError(GPU_SAYS)
    )
    assert "; the plan predicted 18.0 of 24.0 GiB of A10-24GB, most in loss." in error_shown.mistakes[0].fact
    assert "the plan predicted" not in str(memory_error(plan(1, "stop"), LAST, torch.OutOfMemoryError(GPU_SAYS)))


@pytest.mark.parametrize(("micro", "again"), [(2, True), (1, False)])
def test_shrink_requests_smaller_micro_batches_while_there_are_some(micro: int, again: bool) -> None:
    error_shown = memory_error(plan(micro, "shrink"), LAST, torch.OutOfMemoryError(GPU_SAYS))
    assert error_shown.exit_code == EXIT_MEMORY
    assert isinstance(error_shown, AnotherAttempt) == again
    assert ("resumes with batch.micro 1" if again else "set parallel.checkpointing to true") in str(error_shown)


def test_the_host_s_allocator_is_recognised_by_its_message() -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**60)
    assert is_out_of_memory(info.value)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error. Last error:\nFailed to CUDA calloc 4194304 bytes",
    ],
)
def test_allocations_of_cuda_s_libraries_are_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the reader ran out of memory of its own"),
        MemoryError("out of memory"),
        ValueError(GPU_SAYS),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_other_errors_that_mention_memory_are_unchanged(error: Exception) -> None:
    assert not is_out_of_memory(error)
    if isinstance(error, RuntimeError):
        assert not hasattr(caught(error, micro_batch(5)), "__notes__")
