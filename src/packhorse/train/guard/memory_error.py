"""Out of memory: what was being computed, how much memory there was, and the smallest change that needs less."""

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
from packhorse.train.ranks.another_attempt import AnotherAttempt

LONGEST_SHOWN = 8


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator says so; other errors that speak of memory are not read as this one."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # A CUDA call outside torch's allocator; and the host's allocator, which has no class of its own.
    outside = isinstance(error, torch.AcceleratorError) and "out of memory" in str(error)
    return outside or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))


@contextmanager
def noting(micro_batch: MicroBatch, index: int, count: int) -> Iterator[None]:
    """Adds to such an error what was being computed.

    Args:
        micro_batch: Of this rank.
        index: Its place in the step, from 1.
        count: Micro-batches in the step.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            lengths = sorted(micro_batch.document_lengths, reverse=True)
            shown = ", ".join(map(str, lengths[:LONGEST_SHOWN])) + ", …" * (len(lengths) > LONGEST_SHOWN)
            error.add_note(
                f"micro-batch {index} of {count}: {micro_batch.num_tokens} tokens in {len(lengths)} rows ({shown})"
            )
        raise


def memory_error(plan: RunPlan, last: Heartbeat, error: BaseException) -> UserError:
    """What ends a rank that ran out of memory.

    Args:
        plan: Of the run.
        last: What this rank was doing.
        error: The allocator's.
    """
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    where = f"at step {last.step + 1}, phase {last.phase}{notes}"
    fact = f"rank {last.rank} ran out of memory {where}{_peak()}{_planned(plan)}."
    why = str(error).strip().splitlines()[0]
    smaller = with_smaller_micro(plan)
    if plan.recipe.recovery.on_oom == "shrink" and smaller is not None:
        micro = smaller.batch.micro_packs
        fix = f"recovery.on_oom is shrink: `packhorse train` goes on with batch.micro {micro}, the same result."
        return AnotherAttempt("shrink", fact, why, fix, EXIT_MEMORY)
    return UserError(fact, why, f"{suggest_less_memory(plan)}; then `--resume`.", exit_code=EXIT_MEMORY)


def _planned(plan: RunPlan) -> str:
    """What the plan counted on."""
    planned = plan.predicted
    if planned is None:
        return ""
    return (
        f"; the plan counted on {planned.required_bytes / 2**30:.1f} of {planned.memory_bytes / 2**30:.1f} GiB of"
        f" {planned.gpu}, fullest in {planned.phase}"
    )


def _peak() -> str:
    """torch.cuda.max_memory_allocated, and what the device has."""
    if not torch.cuda.is_available():
        return ""
    _, total = torch.cuda.mem_get_info()
    return f"; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB were allocated"
