"""What a part of the GPU run measures on, and how one of its cases is tried."""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = ("src", "tests", "tests/gpu", "benchmarks/gpu", "benchmarks")
ERROR_LINES = 6
LIBRARIES_VARIABLE = "PACKHORSE_GPU_LIBRARIES"

Figures = dict[str, Any]
"""Values of one case by name, with the unit in the name; values are numbers, texts and booleans."""
Case = tuple[str, Callable[[], Figures]]
"""Name of a case, and the function that measures it."""


@dataclass(frozen=True)
class Setting:
    """What to measure on.

    Attributes:
        device: `cuda` or `cpu`.
        folder: For models and runs; removed at the end.
        smoke: Tiny shapes and few cases, to see that it runs.
        gpu: Name of the GPU; empty on a CPU.
    """

    device: str
    folder: Path
    smoke: bool = False
    gpu: str = ""

    @property
    def gpus(self) -> tuple[str, ...]:
        """The one GPU that a plan may use."""
        return (self.gpu,) if self.gpu else ()

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            import torch

            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int = 10, warm_up: int = 3) -> float:
        """Return the mean seconds of `work`."""
        if self.smoke:
            times = warm_up = 1
        for _ in range(warm_up):
            work()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - began) / times


def run_part(name: str, setting: Setting, output: Path) -> None:
    """Measure each case of a part, and write one line of JSON per case as soon as it is known.

    A case that fails is recorded with the end of its traceback, and the next one is tried.
    """
    with output.open("a", encoding="utf-8") as file:
        for case, measure in cases_of(name, setting):
            write_row(file, tried(case, measure))


def cases_of(name: str, setting: Setting) -> Iterable[Case]:
    """Yield the cases of a part; what stops the part itself, such as a missing library, is its last case."""
    try:
        yield from import_module(name).cases(setting)
    except Exception as error:
        yield "whole part", _raiser(error)


def _raiser(error: Exception) -> Callable[[], Figures]:
    def measure() -> Figures:
        raise error

    return measure


def write_row(file: IO[str], row: Figures) -> None:
    """Write a case at once, so that it is kept whatever happens next."""
    file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")
    file.flush()


def tried(case: str, measure: Callable[[], Figures]) -> Figures:
    """Return the figures of a case, or why there are none."""
    began = time.perf_counter()
    try:
        found = measure()
    except (Exception, SystemExit) as error:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        text = "".join(traceback.format_exception(error))
        found = {"missing library": name} if name else {"error": last_lines(text)}
        traceback.clear_frames(error.__traceback__)
    finally:
        _free()
    return {"case": case, **found, "seconds": time.perf_counter() - began}


def last_lines(text: str) -> str:
    """Return the last lines of a log or a traceback, each cut to a length that reads well in a table."""
    lines = [line.strip()[:400] for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-ERROR_LINES:])


def without_names(text: str) -> str:
    """Return a text without the names of this machine, its user and its folders."""
    for name, instead in ((str(ROOT), "packhorse"), (str(Path.home()), "~"), (socket.gethostname(), "host")):
        text = text.replace(name, instead) if len(name) > 1 else text
    return text


def _free() -> None:
    """Let go of what the last case has left on the device, and of the state that accelerate keeps in globals."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | type(None)) else without_names(str(value))


def prepare_process(libraries: str) -> None:
    """Make this checkout and the carried libraries importable, and keep them off the network."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    folders = [*([libraries] if libraries else []), *(str(ROOT / folder) for folder in SEARCHED)]
    sys.path[:0] = folders
    # For the processes of this one, some of which begin without its sys.path.
    os.environ |= {
        LIBRARIES_VARIABLE: libraries,
        "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]),
    }
    if libraries:
        import_module("older_torch").complete(Path(libraries))
