"""Out-of-memory errors: what was being computed, how much memory there was, and the smallest change that needs less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from packhorse.data.packs.loader import MicroBatch
from packhorse.errors import EXIT_MEMORY, UserError
from packhorse.plan.batch import suggest_less_memory
from packhorse.plan.replan import with_smaller_micro
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.train.ranks.attempt import AnotherAttempt

MAX_SHOWN = 8
# Allocations outside torch's CUDA allocator: the host's, cuBLAS's workspace (CUDABlas.cpp), NCCL's buffers (alloc.h).
WITHOUT_OWN_CLASS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator ran out of memory; other errors that mention memory do not count."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError) and "out of memory" in str(error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in WITHOUT_OWN_CLASS)


@contextmanager
def note_micro_batch(micro_batch: MicroBatch, index: int, count: int) -> Iterator[None]:
    """Add a note about the micro-batch, number `index` of `count` from 1, to an out-of-memory error."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            lengths = sorted(micro_batch.document_lengths, reverse=True)
            shown = ", ".join(map(str, lengths[:MAX_SHOWN])) + ", …" * (len(lengths) > MAX_SHOWN)
            error.add_note(
                f"micro-batch {index} of {count}: {micro_batch.num_tokens} tokens in {len(lengths)} rows ({shown})"
            )
        raise


def memory_error(plan: RunPlan, last: Heartbeat, error: BaseException) -> UserError:
    """Return the error that ends a rank that ran out of memory."""
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    where = f"at step {last.step + 1}, phase {last.phase}{notes}"
    fact = f"rank {last.rank} ran out of memory {where}{_peak()}{_planned(plan)}."
    why = str(error).strip().splitlines()[0]
    smaller = with_smaller_micro(plan)
    if plan.recipe.recovery.on_oom == "shrink" and smaller is not None:
        micro = smaller.batch.micro_packs
        fix = f"recovery.on_oom is shrink: `packhorse train` resumes with batch.micro {micro}; the result is the same."
        return AnotherAttempt("shrink", fact, why, fix, EXIT_MEMORY)
    return UserError(
        fact, why, f"{suggest_less_memory(plan)}; then `packhorse resume {plan.recipe.name}`.", exit_code=EXIT_MEMORY
    )


def _planned(plan: RunPlan) -> str:
    """Describe the memory that the plan predicted."""
    planned = plan.predicted
    if planned is None:
        return ""
    return (
        f"; the plan predicted {planned.required_bytes / 2**30:.1f} of {planned.memory_bytes / 2**30:.1f} GiB of"
        f" {planned.gpu}, most in {planned.phase}"
    )


def _peak() -> str:
    """Describe the peak of allocated memory and the memory of the device."""
    if not torch.cuda.is_available():
        return ""
    _, total = torch.cuda.mem_get_info()
    return f"; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB were allocated"
