"""`packhorse profile RUN`: where the time of a step went."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from packhorse.cli.show.text import open_console, pairs, plain_table, print_json
from packhorse.errors import EXIT_OK
from packhorse.report.step_time import StepTime
from packhorse.run_folder.folder import open_run, relative
from packhorse.workflows.profile import profile_run

NUM_SHOWN = 12
LONGEST_NAME = 90


def profile(run: str, rank: int | None, json: bool) -> int:
    """Print where the time of the profiled steps of a rank went.

    Raises:
        UserError: There is no such run, or no trace of the rank.
    """
    trace, found = profile_run(open_run(run), rank or 0)
    if json:
        print_json({"trace": str(trace), **asdict(found)})
        return EXIT_OK
    console = open_console()
    console.print(pairs(_lines(trace, found)))
    for table in (_phases(found), _work(found)):
        console.print()
        console.print(table)
    return EXIT_OK


def _lines(trace: Path, found: StepTime) -> list[tuple[str, str]]:
    first, last = found.steps
    lines = [
        ("trace", f"{relative(trace)}; https://ui.perfetto.dev opens it"),
        ("steps", f"{first:,} to {last:,}, {found.step_seconds:.3f} s per step while profiled"),
    ]
    if found.idle_share is not None:
        waits = sum(phase.waits for phase in found.phases)
        seconds = sum(phase.wait_seconds for phase in found.phases)
        lines += [
            ("GPU", f"idle {found.idle_share:.1%} of the time"),
            ("waits", f"the host waits for the GPU {waits:.1f} times per step, {seconds:.3f} s"),
        ]
    kinds = " · ".join(f"{each.name} {each.share:.1%}" for each in found.kinds)
    lines.append(("kernels" if found.idle_share is not None else "operators", kinds))
    if found.elementwise_per_product is not None:
        lines.append(("elementwise", f"{found.elementwise_per_product:.2f} s per second of matrix products"))
    return lines


def _phases(found: StepTime) -> Table:
    on_gpu = found.idle_share is not None
    columns = ("phase", "seconds", "share", *(("GPU seconds", "waits", "wait seconds") if on_gpu else ()))
    table = plain_table(*columns, right=columns[1:])
    for phase in found.phases:
        cells = [phase.name, f"{phase.seconds:.4f}", f"{phase.seconds / found.step_seconds:.1%}"]
        if phase.device_seconds is not None:
            cells += [f"{phase.device_seconds:.4f}", f"{phase.waits:.1f}", f"{phase.wait_seconds:.4f}"]
        table.add_row(*cells)
    return table


def _work(found: StepTime) -> Table:
    name = "kernel" if found.idle_share is not None else "operator"
    table = plain_table(name, "seconds", "share", "calls", right=("seconds", "share", "calls"))
    for each in found.top[:NUM_SHOWN]:
        shown = each.name if len(each.name) <= LONGEST_NAME else f"{each.name[: LONGEST_NAME - 1]}…"
        table.add_row(shown, f"{each.seconds:.4f}", f"{each.share:.1%}", f"{each.calls:,.0f}")
    return table
