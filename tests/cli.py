"""The `packhorse` command as a user types it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INJECTED = Path(__file__).parent / "faults" / "injected"
PACKHORSE = Path(sys.executable).parent / "packhorse"
ROOM = 3.0 if "PYTEST_XDIST_WORKER" in os.environ else 1.0
"""How many times longer something may take where other tests run beside it."""


@dataclass(frozen=True)
class Typed:
    code: int
    out: str
    err: str


def environment(fault: str = "") -> dict[str, str]:
    """Of a user without a network; `fault` is put into the ranks (tests/faults/injected/sitecustomize.py)."""
    ours = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    path = os.pathsep.join(filter(None, [str(INJECTED), os.environ.get("PYTHONPATH")]))
    return ours | {"PACKHORSE_FAULT": fault, "PYTHONPATH": path} if fault else ours


def packhorse(folder: Path, *words: str, timeout: float = 600, fault: str = "") -> Typed:
    """Types `packhorse WORDS` in `folder`."""
    done = subprocess.run(
        [str(PACKHORSE), *words], cwd=folder, env=environment(fault), capture_output=True, text=True, timeout=timeout
    )
    return Typed(done.returncode, done.stdout, done.stderr)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(run: Path, key: str = "train/loss") -> list[float]:
    """A figure over the steps."""
    return [line[key] for line in metrics(run) if key in line]


def processes_that_name(run: Path) -> list[int]:
    """Every process, of the launch or not, that has this run's plan in its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(run / "plan.json") in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found
