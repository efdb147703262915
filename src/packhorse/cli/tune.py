"""`packhorse tune`: measure settings of a recipe on this machine."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

from rich.table import Table

from packhorse.cli.prepare import prepare_with_progress
from packhorse.cli.show.text import open_console, plain_table, print_json, print_plain
from packhorse.cli.train import terminal_reporter
from packhorse.durable import size
from packhorse.errors import UserError
from packhorse.workflows import tune as workflow
from packhorse.workflows.new_run import Reporter, load_single
from packhorse.workflows.prepare import manifest_of_prepared
from packhorse.workflows.tune import Candidate, Trial, Tuning


def tune(
    recipe: str,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    candidates: str = "",
    gpus: int | None = None,
    json: bool = False,
) -> int:
    """Measure candidates, print a table and the overrides to take; return the exit code.

    Args:
        recipe: Recipe of one run.
        overrides: Overrides of the recipe.
        steps: Steps of each candidate.
        candidates: Candidates, see `read_candidates`.
        gpus: Number of processes, one per GPU.
        json: Print one JSON value.

    Raises:
        UserError: The recipe unchanged cannot be measured here.
    """
    with _output_to_stderr() if json else nullcontext():
        result = workflow.tune(
            load_single(recipe, overrides),
            read_candidates(candidates),
            steps or workflow.STEPS,
            gpus,
            manifest_of_prepared if json else prepare_with_progress,
            Reporter() if json else terminal_reporter(),
        )
    if json:
        print_json(asdict(result))
    else:
        open_console().print(table(result))
        print_plain(advice(result, recipe, overrides))
    return result.exit_code


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Send what the ranks print to standard error, so that standard output is one JSON value."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def read_candidates(text: str) -> list[Candidate]:
    """Return the candidates of `--candidates`: separated by commas, their overrides by `+`.

    Raises:
        UserError: An override has no `=`.
    """
    found = [tuple(candidate.split("+")) for candidate in text.split(",") if candidate]
    for override in (override for candidate in found for override in candidate):
        if "=" not in override:
            raise UserError(
                f"--candidates names {override}, which sets no field.",
                "a candidate is a change of the recipe, as on the command line of train.",
                "write for example --candidates parallel.compile=true,parallel.checkpointing=2.",
            )
    return found


def table(result: Tuning) -> Table:
    """Return one line per candidate."""
    first = result.trials[0].tokens_per_second
    columns = ("tokens/s", "", "peak memory", "first step", "loss apart")
    shown = plain_table("candidate", *columns, "", right=columns)
    for trial in result.trials:
        shown.add_row(" ".join(trial.overrides) or "the recipe unchanged", *_cells(trial, first), trial.why_not)
    return shown


def _cells(trial: Trial, first: float | None) -> list[str]:
    speed = trial.tokens_per_second
    if speed is None or trial.peak_bytes is None:
        return ["", "", "", "", ""]
    gain = f"{speed / first - 1:+.0%}" if first and trial.overrides else ""
    apart = "" if trial.loss_difference is None else f"{trial.loss_difference:.1e}"
    return [f"{speed:,.0f}", gain, size(int(trial.peak_bytes)), f"{trial.first_step_seconds:.1f} s", apart]


def advice(result: Tuning, recipe: str, overrides: Sequence[str]) -> str:
    """Return the command to type, or that none is needed."""
    if not result.best:
        return "no candidate is faster with the same loss: train the recipe unchanged"
    return f"take: {shlex.join(['packhorse', 'train', recipe, *overrides, *result.best])}"
