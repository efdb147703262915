"""Faults by the hundred against real runs, and a table of what was lost in docs/lab-log.md.

    python benchmarks/chaos.py [--kills 200] [--minutes 20] [--steps-per-fault 800] [--no-write]

Two parts, each on two CPU processes, each compared to the last bit with a run that nobody touched:

- SIGKILL at random moments of a run that saves every 2 steps, half of them with asynchronous saving
- twelve kinds of faults, one every 20 seconds on average, for so many minutes

Exit code 1 if a run needs a human, is not the same in the end, or loses more than it may.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "faults"))

import lab_log
from chaos import Report, Weather, differences
from ranks import trained
from tiny import write_tiny

PACKAGES = ("torch", "accelerate", "transformers")
WORDS = ("parallel.processes=2", "recovery.restarts=100000", "recovery.hang_seconds=8", "recovery.on_spike=ignore")
KILLS = ("kill_rank", "kill_ranks", "kill_launcher", "kill_all")
FAULTS = (*KILLS, "hang", "stop_launcher", "stop_rank", "stop_by_hand", "raise", "leave", "nan", "damage")
MEAN_SECONDS = 20.0
LEAST_EFFECTIVE = 0.90
EFFECTIVE_RATIO = "steps that count ÷ steps made"


@dataclass(frozen=True)
class Case:
    """A run under faults.

    Attributes:
        name: Row of the table.
        steps: Of the run; enough that all faults strike before its end.
        save_every: Steps between two checkpoints.
        asynchronous: Whether they are written while training goes on.
        strikes: Faults in their order.
        wait: Seconds of work before the next one; where `most_lost` is None, seconds since the one before.
        most_lost: Steps that one fault may cost; None where a damaged checkpoint may cost one interval more.
    """

    name: str
    steps: int
    save_every: int
    asynchronous: bool
    strikes: list[str]
    wait: Callable[[random.Random], float]
    most_lost: int | None


def main() -> int:
    """Runs the cases and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--steps-per-fault", type=int, default=800, help="of the second part: fewer on a slower machine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="show the table, leave docs/lab-log.md as it is")
    parser.add_argument("--smoke", action="store_true", help="one kill, to see that it runs; written nowhere")
    options = parser.parse_args()
    if options.smoke:
        options.kills, options.minutes, options.no_write = 2, 0, True
    rows, faults = [], []
    for case in cases(options, random.Random(options.seed)):
        with tempfile.TemporaryDirectory() as folder:
            report, different = run_case(case, Path(folder), options.seed)
        rows.append(row(case, report, different))
        faults += [f"{case.name}: {fault}" for fault in checkpoint_faults(case, report, different)]
        print(lab_log.markdown_table(HEADER, rows), flush=True)
    text = table(rows, faults)
    print(text)
    if not options.no_write:
        lab_log.append("Chaos: runs under faults", text)
    return 1 if faults else 0


def cases(options: argparse.Namespace, draw: random.Random) -> list[Case]:
    """Half the kills with synchronous saving, half without, then all kinds of faults."""

    def a_moment(moment: random.Random) -> float:
        return -moment.uniform(0.5, 6) if moment.random() < 0.15 else moment.uniform(0, 1)

    def a_while(moment: random.Random) -> float:
        return moment.expovariate(1 / MEAN_SECONDS)

    found = []
    for asynchronous in (False, True):
        number = options.kills // 2
        strikes = [draw.choice(KILLS) for _ in range(number)]
        name = f"SIGKILL, {'asynchronous' if asynchronous else 'synchronous'} saving"
        found.append(Case(name, 40 * number, 2, asynchronous, strikes, a_moment, 2 * (1 + asynchronous)))
    number = round(options.minutes * 60 / MEAN_SECONDS)
    strikes = [*FAULTS, *(draw.choice(FAULTS) for _ in range(number))][:number]
    draw.shuffle(strikes)
    found.append(Case("all kinds of faults", options.steps_per_fault * number, 10, True, strikes, a_while, None))
    struck = [case for case in found if case.strikes]
    return struck[:1] if options.smoke else struck


def run_case(case: Case, folder: Path, seed: int) -> tuple[Report, list[str]]:
    """The run without faults, then the one with them."""
    recipe = write_tiny(
        folder,
        steps=case.steps,
        batch={"length": 256, "packs": 2},
        checkpoint={"every_steps": case.save_every, "asynchronous": case.asynchronous, "keep_last": 3},
        evaluation={"every_steps": 500, "max_answered_rows": 0},
    )
    unbroken = trained(recipe, "unbroken", *WORDS)
    weather = Weather(folder, "tiny.yaml", "broken", WORDS, seed)
    report = weather.pass_over(case.strikes, case.wait, seconds=4 * 3600, from_strike=case.most_lost is None)
    return report, differences(weather.run, unbroken)


def checkpoint_faults(case: Case, report: Report, different: list[str]) -> list[str]:
    """What is not as it must be."""
    found = []
    if report.exit_code != 0:
        found.append(f"ended with {report.exit_code}: {report.tail[-500:]}")
    if different:
        found.append(f"not as the run without faults: {', '.join(different[:5])}")
    if sum(report.faults.values()) < len(case.strikes):
        found.append(f"only {sum(report.faults.values())} of {len(case.strikes)} faults struck before its end")
    if case.most_lost is not None and max(report.lost, default=0) > case.most_lost:
        found.append(f"lost {max(report.lost)} steps at once, {case.most_lost} are allowed")
    if case.most_lost is None and report.effective_ratio < LEAST_EFFECTIVE:
        found.append(f"{EFFECTIVE_RATIO} is {report.effective_ratio:.3f}, {LEAST_EFFECTIVE} is the least")
    return found


HEADER = (
    "case",
    "faults",
    "attempts",
    "steps",
    "most lost at once",
    "lost in all",
    "ETTR (steps)",
    "min",
    "as without",
)


def row(case: Case, report: Report, different: list[str]) -> list[str]:
    """A line of the table."""
    return [
        case.name,
        str(sum(report.faults.values())),
        str(len(report.attempts)),
        f"{report.num_steps:,}",
        str(max(report.lost, default=0)),
        f"{sum(lost for lost in report.lost if lost > 0):,}",
        f"{report.effective_ratio:.3f}",
        f"{report.seconds / 60:.0f}",
        "no" if different else "bit for bit",
    ]


def table(rows: list[list[str]], faults: list[str]) -> str:
    """With what it was measured on."""
    lines = [
        "A tiny Llama, fp32, DDP on 2 CPU processes; checkpoints every 2 steps (kills) and every 10. Nobody helped:",
        "`--restarts` and, where the launcher itself was killed or stopped, another `packhorse train RUN --resume`.",
        f"ETTR: {EFFECTIVE_RATIO}. {lab_log.machine(len(os.sched_getaffinity(0)), PACKAGES)}.",
        "",
        lab_log.markdown_table(HEADER, rows),
        "",
        *(["Not as it must be: " + "; ".join(faults) + "."] if faults else []),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
