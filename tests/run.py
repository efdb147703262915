"""Runs all tests that this machine can run, group by group, two things at a time; `make test` calls it.

    python tests/run.py [GROUP ...] [-- words for pytest]

Two lanes go side by side. One runs what uses both cores (pytest-xdist, two processes, a file at a time each); the
other checks the source, then runs the tests of Slurm, which mostly wait. DeepSpeed's C++ part is built in the
background from the first second on. The output of the first lane is shown as it comes, that of the second at its end.

Exit code 1 where any group fails. The last line counts the tests of all groups in pytest's form.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SOURCES = ("src", "tests", "launch", "benchmarks", "tools")
# Two threads that wait for each other on a core that others use are ten times slower than one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DURATIONS = ("--durations=60", "--durations-min=2")
NO_TESTS = 5
"""Exit code of pytest where it collected none."""
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)")


@dataclass(frozen=True)
class Group:
    """Commands that run one after the other.

    Attributes:
        name: What the command line and the closing lines call it.
        commands: Programs of this environment with their words.
        is_pytest: Whether the one command is pytest, whose tests are counted.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    is_pytest: bool = True


def tests(name: str, *words: str) -> Group:
    """A group of tests below `tests`."""
    return Group(name, (("pytest", *words, *DURATIONS),))


IN_PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
ON_BOTH_CORES = ("parity", "process", "faults", "benchmarks", "real", "unit", "golden", "gpu", "browser")
LINT = Group("lint", (("ruff", "format", "--check", *SOURCES), ("ruff", "check", *SOURCES), ("mypy",)), is_pytest=False)
FIRST_LANE = (
    # Files that take long come first, by tests/conftest.py, so that both processes end together.
    tests("tests", *(f"tests/{folder}" for folder in ON_BOTH_CORES), *IN_PARALLEL),
    tests("soft-cuda", "tests/soft_cuda", *IN_PARALLEL),
    tests("gpu", "tests/gpu", "-m", "gpu"),
)
SECOND_LANE = (LINT, tests("slurm", "tests/slurm"))


@dataclass
class Result:
    """What became of a group.

    Attributes:
        name: The group.
        code: Exit code; 0 where all went well.
        seconds: From its start to its end.
        counts: Tests by outcome, in pytest's words.
        failures: The lines in which pytest names each test that failed.
    """

    name: str
    code: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def main() -> int:
    """Runs the lanes and prints the closing lines."""
    names = [group.name for group in (*FIRST_LANE, *SECOND_LANE)]
    words = sys.argv[1:]
    more = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"one of {', '.join(names)}; absent: all")
    chosen = parser.parse_args(words[: words.index("--")] if "--" in words else words).groups or names
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no group {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    began = time.monotonic()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="packhorse-tests-") as folder:
        builder = threading.Thread(target=build_extension, args=(Path(folder) / "build.log",), daemon=True)
        builder.start()
        lanes = [
            threading.Thread(
                target=run_lane, args=([g for g in lane if g.name in chosen], shown, folder, more, results)
            )
            for lane, shown in ((FIRST_LANE, True), (SECOND_LANE, False))
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        builder.join()
    results.sort(key=lambda result: names.index(result.name))
    print("\n".join(closing_lines(results, time.monotonic() - began)), flush=True)
    return int(any(result.code for result in results))


def run_lane(groups: Sequence[Group], is_shown: bool, folder: str, more: Sequence[str], results: list[Result]) -> None:
    """Runs groups one after the other; a group that fails stops none of the others."""
    for group in groups:
        results.append(run_group(group, is_shown, Path(folder) / f"{group.name}.log", more))


def run_group(group: Group, is_shown: bool, log: Path, more: Sequence[str]) -> Result:
    """Runs a group's commands until one fails; its output goes to the terminal, at once or at its end."""
    result, began = Result(group.name), time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        for program, *words in group.commands:
            argv = [str(BIN / program), *words, *(more if group.is_pytest else ())]
            with subprocess.Popen(
                argv,
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    file.write(line)
                    if is_shown:
                        sys.stdout.write(line)
                        sys.stdout.flush()
            # Words of the user may choose none of a group's tests; without them a group has some.
            result.code = 0 if child.returncode == NO_TESTS and more else child.returncode
            if result.code:
                break
    result.seconds = time.monotonic() - began
    text = log.read_text(encoding="utf-8")
    if not is_shown:
        print(f"\n----- {group.name} -----\n{text}", flush=True)
    if group.is_pytest:
        lines = text.splitlines()
        result.failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        for number, outcome in COUNTS.findall(lines[-1] if lines else ""):
            result.counts["error" if outcome.startswith("error") else outcome] += int(number)
    return result


def closing_lines(results: Sequence[Result], seconds: float) -> list[str]:
    """A line for each group, each failing test again, and one line in pytest's form."""
    counts: Counter[str] = Counter()
    for result in results:
        counts += result.counts
    plural = {"error": "errors"} if counts["error"] > 1 else {}
    outcomes = ("failed", "error", "passed", "skipped")
    shown = [f"{counts[name]} {plural.get(name, name)}" for name in outcomes if counts[name]]
    broken = [result.name for result in results if result.code and not result.failures]
    lines = ["", "----- all groups -----"]
    for result in results:
        state = f"exit code {result.code}" if result.code else "ok"
        told = ", ".join(f"{number} {name}" for name, number in result.counts.items())
        lines.append(f"{result.name}: {state}, {told + ', ' if told else ''}{result.seconds / 60:.1f} min")
    lines += [line for result in results for line in result.failures]
    lines += [f"FAILED {name}: the output above says why" for name in broken]
    words = f" {', '.join(shown) or 'no tests ran'} in {seconds:.2f}s ({seconds / 60:.1f} min) "
    return [*lines, words.center(100, "=")]


BUILD = """
import os
from packhorse.launching.local.environment import FOLDER_VARIABLE, extensions_folder, remove_abandoned_locks
folder = extensions_folder()
remove_abandoned_locks(folder)
os.environ[FOLDER_VARIABLE] = str(folder)
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
"""


def build_extension(log: Path) -> None:
    """Builds what DeepSpeed needs on a CPU, as its first rank would: tests that need it wait or find it built."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, "-c", BUILD], env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        told = log.read_text(encoding="utf-8")[-1000:]
        print(f"DeepSpeed's C++ part could not be built, its tests will say why: {told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
