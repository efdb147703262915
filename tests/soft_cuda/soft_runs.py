"""Runs planned for GPUs and trained by the real worker on soft CUDA, in ranks forked from one warmed-up process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from packhorse.plan.run_plan import read_plan
from packhorse.workflows.new_run import write_run
from ranks import last_words

FOLDER = Path(__file__).parent
GPU = "H100-80GB"


class SoftCuda:
    """The process of soft_ranks.py; a context manager."""

    def __init__(self, log: Path) -> None:
        paths = [FOLDER, FOLDER.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(FOLDER / "soft_ranks.py")],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._log = log
        self._once: Path | None = None

    def __enter__(self) -> SoftCuda:
        assert self._answer() == "ready"
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.communicate(timeout=60)

    def trained(self, recipe: Path, name: str, *words: str) -> Path:
        """The folder of a new run on GPUs, trained to its end."""
        run = self.planned(recipe, name, *words)
        self.to_the_end(run)
        return run

    @staticmethod
    def planned(recipe: Path, name: str, *words: str) -> Path:
        """The folder of a run planned for as many GPUs as `parallel.processes` says."""
        runs = recipe.parent / "runs"
        processes = next((word.split("=")[1] for word in words if word.startswith("parallel.processes=")), "1")
        told = [f"name={name}", f"runs_folder={runs}", "parallel.processes=1", *words]
        write_run(str(recipe), told, f"{processes}x{GPU}", None)
        return runs / name

    def to_the_end(self, run: Path, attempt: int = 1) -> None:
        """Runs every rank once; each must end well."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"run": str(run), "attempt": attempt}) + "\n")
        self._process.stdin.flush()
        ended = [(record["exit_code"], record["message"]) for record in json.loads(self._answer())]
        assert ended == [(0, "")] * read_plan(run).topology.world_size, last_words(run) or ended

    def once(self, make: Callable[[], Path]) -> Path:
        """A run that several tests are held against, trained by the first of them."""
        self._once = self._once or make()
        return self._once

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._log.read_text(encoding="utf-8")[-3000:]
        return line.strip()
