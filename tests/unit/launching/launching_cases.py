"""A planned run of two ranks, and ranks that are real processes with heartbeats written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from packhorse.launching.local.watch import processes_of
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import create_run
from packhorse.run_folder.heartbeat import Heartbeat

NOW = 1000.0
PREPARED = DataFacts(
    folder="/data",
    content_hash="0",
    tokenizer="t",
    num_rows=1,
    num_packs=1,
    num_tokens=1,
    num_supervised_tokens=1,
    fill=1.0,
)
"""Facts of prepared data, as in a plan that can be run."""


def planned(folder: Path, **sections: Any) -> RunPlan:
    """Return the plan of a new run: two processes on the CPU, 40 steps, 8 packs per step; hang_seconds is 60."""
    fields = {
        "name": "r",
        "runs_folder": str(folder),
        "model": {"id": "meta-llama/Llama-3.1-8B-Instruct"},
        "data": {"sources": [{"path": "r.jsonl"}]},
        "batch": {"packs": 8, "length": 64},
        "optimizer": {"learning_rate": 1e-4},
        "steps": 40,
        "parallel": {"processes": 2},
        "recovery": {"hang_seconds": 60},
    }
    recipe = Recipe.model_validate(fields | sections)
    plan = make_plan(recipe, DeviceRequest(), Hardware(num_cores=2, gpus=()), None).model_copy(update={"num_steps": 40})
    create_run(plan, {})
    return plan


class Ranks:
    """The ranks of an attempt."""

    def __init__(self, plan: RunPlan, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-c", "import time; time.sleep(60)", *plan.argv[-2:]]
        self.processes = [subprocess.Popen(words) for _ in range(plan.topology.world_size)]
        # The kernel shows a command line a moment after the program has begun.
        end = time.monotonic() + 10
        while len(processes_of(plan)) < len(self.processes):
            assert time.monotonic() < end
            time.sleep(0.01)
        self.logs = logs
        for rank in range(len(self.processes)):
            self.beat(rank)

    def beat(self, rank: int, **changes: Any) -> Heartbeat:
        """Write a rank's heartbeat: by default in the forward pass of step 6 for a second."""
        usual = Heartbeat(rank, self.processes[rank].pid, "here", "forward", 5, NOW - 1, NOW - 1, 0)
        beat = replace(usual, **changes)
        (self.logs / f"heartbeat-{rank}.json").write_text(json.dumps(asdict(beat)))
        return beat

    def record(self, rank: int, exit_code: int, message: str = "", at: float = NOW, again: str | None = None) -> None:
        """Write how a rank ended."""
        record = {"rank": rank, "time": at, "exit_code": exit_code, "message": message, "again": again}
        (self.logs / f"rank-{rank}.json").write_text(json.dumps(record))

    def kill(self, rank: int) -> None:
        """Kill a rank with SIGKILL; it may stay a zombie until its parent waits for it."""
        self.processes[rank].kill()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
