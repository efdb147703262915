"""Everything that only a GPU can show of Packhorse, in one run of at most 8 minutes on one card, in one file.

    python benchmarks/gpu [--minutes 8] [--parts facts,training] [--output gpu-report.md] [--libraries FOLDER]

The parts run one after the other, the most telling first, each in its own process and with its own time limit. A part
that fails, or lacks a library, is recorded, and the next one runs. The file is written again after each part, so that
a run that is stopped loses only the part that was running. docs/gpu.md says what the parts measure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import PartResult, write_report
from setting import LIBRARIES_VARIABLE, ROOT, Setting, last_lines, prepare_process, run_part, without_names

PART_SECONDS = {
    "facts": 45,
    "training": 80,
    "memory": 110,
    "speed": 150,
    "quantized": 70,
    "checkpoint": 60,
    "decoding": 30,
    "numerics": 70,
    "out_of_memory": 60,
}
"""Limit of each part. They add up to more than 8 minutes: a limit is for what hangs, and most parts take less."""
KILL_SECONDS = 5.0


@dataclass
class Run:
    """Parts that have ended, and the one that runs.

    Attributes:
        end: When the whole run ends, on the monotonic clock.
        folder: For models, runs and the rows of each part.
    """

    output: Path
    folder: Path
    end: float
    words: Sequence[str]
    results: list[PartResult] = field(default_factory=list)

    def measure(self, part: str, seconds: float) -> None:
        """Run a part in its own process group, and write the report again."""
        limit = min(seconds, self.end - time.monotonic())
        if limit < 1:
            self.results.append(PartResult(part, [], 0.0, "not started: no time is left"))
        else:
            self.results.append(self._measured(part, limit))
        write_report(self.output, self.results)

    def _measured(self, part: str, limit: float) -> PartResult:
        rows, log = self.folder / f"{part}.jsonl", self.folder / f"{part}.log"
        command = [sys.executable, str(Path(__file__)), *self.words, "--part", part, "--folder", str(self.folder)]
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        ending = ""
        try:
            if code := child.wait(limit):
                ending = f"ended with exit code {code}\n{without_names(last_lines(log.read_text('utf-8', 'replace')))}"
        except subprocess.TimeoutExpired:
            ending = f"stopped at its limit of {limit:.0f} s"
        except KeyboardInterrupt:
            ending = "stopped by hand"
            self.end = time.monotonic()
        finally:
            end_group(child)
        return PartResult(part, read_rows(rows), time.monotonic() - began, ending)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the cases that a part has written; the last line may be cut."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a part with all processes that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(KILL_SECONDS)


def main(words: Sequence[str]) -> int:
    """Measure the requested parts; return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of the whole run; default: 8")
    parser.add_argument(
        "--parts", default=",".join(PART_SECONDS), help="names with commas; default: all, in this order"
    )
    parser.add_argument("--output", default="gpu-report.md", help="the file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the script")
    parser.add_argument("--libraries", default="", help="folder of libraries that this machine lacks; see docs/gpu.md")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.part:
        run_one(options)
        return 0
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PART_SECONDS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PART_SECONDS)}")
    output = Path(options.output).absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="packhorse-gpu-", ignore_cleanup_errors=True) as folder:
        run = Run(output, Path(folder), time.monotonic() + 60 * options.minutes, list(words))
        for part in parts:
            print(f"{part} …", flush=True)
            run.measure(part, PART_SECONDS[part])
            shutil.rmtree(Path(folder) / part, ignore_errors=True)
    print(f"written: {output}")
    return int(any(result.has_failed for result in run.results))


def run_one(options: argparse.Namespace) -> None:
    """Measure one part in this process."""
    prepare_process(options.libraries)
    name = ""
    if options.device == "cuda":
        import torch

        name = torch.cuda.get_device_name(0)
    folder = Path(options.folder)
    (folder / options.part).mkdir()
    setting = Setting(options.device, folder / options.part, options.smoke, name)
    run_part(options.part, setting, folder / f"{options.part}.jsonl")


if __name__ == "__mp_main__":  # in a process that a part has started
    prepare_process(os.environ.get(LIBRARIES_VARIABLE, ""))
if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
