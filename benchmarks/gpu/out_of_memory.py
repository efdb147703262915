"""Part `out_of_memory`: memory runs out under the real worker: exit code, message, smaller passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packhorse.errors import EXIT_MEMORY, EXIT_OK
from packhorse.plan.replan import with_smaller_micro
from packhorse.plan.run_plan import write_plan
from packhorse.train.guard.memory_error import is_out_of_memory
from packhorse.train.objectives import objective
from runs import TINY, make_run, train, write_model
from setting import Case, Figures, Setting

CONFIG = {**TINY, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
PACKS, TOKENS = 16, 2048
"""About 16 GiB of activations in one pass."""
LEFT_BYTES = 6 * 2**30
"""Enough for the weights, their states, and passes of 4 packs."""


@dataclass(frozen=True)
class FillGpu:
    """Leave this process only so many bytes of the GPU."""

    left_bytes: int

    def __call__(self) -> None:
        """Allocate the rest, and keep it as long as the process lives."""
        free, _ = torch.cuda.mem_get_info()
        filled = torch.empty(max(free - self.left_bytes, 0), dtype=torch.uint8, device="cuda")
        torch.cuda.filled_memory = filled  # type: ignore[attr-defined]


@dataclass(frozen=True)
class FailAbove:
    """Let passes of more tokens fail: for a CPU, whose memory is better not filled."""

    num_tokens: int

    def __call__(self) -> None:
        """Replace the forward pass of the step loop."""
        real = objective.micro_batch_loss

        def limited(model: Any, micro_batch: Any, *others: Any) -> Tensor:  # noqa: ANN401
            if micro_batch.num_tokens > self.num_tokens:
                raise torch.OutOfMemoryError("out of memory. This is made up: the device is a CPU.")
            return real(model, micro_batch, *others)

        objective.micro_batch_loss = limited


def cases(setting: Setting) -> Iterator[Case]:
    """Yield a run that stops, one that shrinks its passes, and an error of a library that allocates memory itself."""
    base = write_model(setting.folder / "base", TINY if setting.smoke else CONFIG, setting)
    yield "recovery.on_oom: stop", lambda: _stopped(setting, base)
    yield "recovery.on_oom: shrink", lambda: _shrunk(setting, base)
    if setting.is_cuda:
        yield "cuBLAS without memory", _cublas


def _run(setting: Setting, base: Path, on_oom: str) -> tuple[Any, Any]:
    packs, tokens = (4, 32) if setting.smoke else (PACKS, TOKENS)
    sections = {"method": "full", "recovery": {"on_oom": on_oom}}
    run = make_run(setting, on_oom, base, (tokens,), packs=packs, micro=packs, steps=2, **sections)
    return run, FillGpu(LEFT_BYTES) if setting.is_cuda else FailAbove(2 * tokens)


def _stopped(setting: Setting, base: Path) -> Figures:
    run, before = _run(setting, base, "stop")
    record = train(run.plan, before=before)
    code = record["exit_code"]
    return {"exit code": code, "is that of memory": code == EXIT_MEMORY, "message": record["message"][-900:]}


def _shrunk(setting: Setting, base: Path) -> Figures:
    """Follow the plan to smaller passes as the launcher does, until the run ends."""
    run, before = _run(setting, base, "shrink")
    plan, attempt, codes = run.plan, 1, []
    while True:
        record = train(plan, attempt, before)
        codes.append(record["exit_code"])
        smaller = with_smaller_micro(plan)
        if record["again"] != "shrink" or smaller is None:
            break
        plan, attempt = smaller, attempt + 1
        write_plan(plan, run.folder)
    return {
        "exit codes": ", ".join(map(str, codes)),
        "packs of a pass at the end": plan.batch.micro_packs,
        "shrank and finished": len(codes) > 1 and codes[-1] == EXIT_OK,
        "last message": record["message"][-300:],
    }


def _cublas() -> Figures:
    """Fill the GPU, and make the first product of this process: cuBLAS needs a handle and a workspace."""
    left, right = (torch.ones(64, 64, device="cuda") for _ in range(2))
    filled, size = [], torch.cuda.mem_get_info()[0]
    while size >= 2**20:
        try:
            filled.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    try:
        left @ right
        torch.cuda.synchronize()
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0][:300]
        return {"class": type(error).__name__, "taken for out of memory": is_out_of_memory(error), "text": text}
    return {"class": None, "taken for out of memory": None, "text": "the product needed no more memory"}
