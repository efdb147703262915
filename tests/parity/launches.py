"""Engines of the matrix, and a recipe trained under one of them as a user trains it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cli import PACKHORSE, Typed, environment, packhorse
from ranks import trained

TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Engine:
    """An engine of the recipe and its number of processes."""

    name: str
    processes: int


ENGINES = {
    "single": Engine("single", 1),
    "ddp x 2": Engine("ddp", 2),
    "zero1 x 2": Engine("zero1", 2),
    "zero2 x 2": Engine("zero2", 2),
    "zero3 x 2": Engine("zero3", 2),
    "fsdp2 x 2": Engine("fsdp2", 2),
    "zero3 x 4": Engine("zero3", 4),
}


def train(recipe: Path, engine: Engine, name: str, *words: str) -> Path:
    """Trains the recipe under this name; the run folder, where it stands beside the recipe."""
    told = [recipe.name, f"name={name}", f"parallel.engine={engine.name}", f"parallel.processes={engine.processes}"]
    if engine.processes <= len(os.sched_getaffinity(0)):
        done = packhorse(recipe.parent, "train", *told, *words, timeout=TIMEOUT_SECONDS)
    else:
        # `train` refuses more processes than cores, since they wait for each other. Planned here, launched by hand.
        done = launch_by_hand(recipe.parent, name, [*told, *words])
    assert done.code == 0, done.err
    return recipe.parent / "runs" / name


def train_forked(recipe: Path, engine: Engine, name: str, *words: str) -> Path:
    """Trains the recipe under this name without a launcher: ranks forked from a process that has imported all."""
    return trained(recipe, name, f"parallel.engine={engine.name}", f"parallel.processes={engine.processes}", *words)


def launch_by_hand(folder: Path, name: str, words: list[str], script: Path | None = None) -> Typed:
    """Plan a run, and type the launch command of its plan; with another script where one is given."""
    planned = packhorse(folder, "plan", *words, "--write")
    assert planned.code == 0, planned.err
    launcher, verb, *argv = json.loads((folder / "runs" / name / "plan.json").read_text(encoding="utf-8"))["argv"]
    if script is not None:
        argv = [str(script) if word.endswith("launch/train.py") else word for word in argv]
    done = subprocess.run(
        # A free port: another test may launch at the same time.
        [str(PACKHORSE.with_name(launcher)), verb, "--main_process_port", "0", *argv],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    return Typed(done.returncode, done.stdout, done.stderr)
