"""`packhorse evaluate` and `packhorse chat`: the model that training made, compared with its base."""

from __future__ import annotations

import sys
from pathlib import Path

from packhorse.cli.show.sweep_evaluation import show_sweep_evaluation
from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_NO_GO, EXIT_OK, UserError
from packhorse.evaluate.chat import ChatSession
from packhorse.evaluate.chat import chat as run_chat
from packhorse.evaluate.evaluate_run import subject_of
from packhorse.evaluate.models import load_tuned
from packhorse.evaluate.show import render
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.sweep import find_sweep
from packhorse.workflows.evaluate import evaluate_run, result_file
from packhorse.workflows.evaluate_sweep import evaluate_sweep
from packhorse.workflows.prepared_data import require_data


def evaluate(run: str, test: bool = False, again: bool = False) -> int:
    """Compare base and tuned model on the held-out rows of a run, or of each run of a sweep, and keep the result.

    Returns:
        Exit code: 3 if a critical condition of `evaluation.gate` is not met.

    Raises:
        UserError: The run has not finished, there are no such rows, or the test rows were opened before.
    """
    if again and not test:
        raise UserError(
            "--again is given without --test.",
            "only the test rows are sealed; the others may be measured any number of times.",
            "write --test --again, or remove --again.",
        )
    sweep = find_sweep(run)
    if sweep is not None:
        return _evaluate_sweep(sweep, test)
    plan = open_run(run)
    console = open_console()
    comparison = evaluate_run(plan, test, again)
    console.print(render(comparison))
    console.print(f"saved as {result_file(Path(plan.run_folder), test)}", soft_wrap=True, highlight=False, style="dim")
    return EXIT_NO_GO if comparison.decision == "NO-GO" else EXIT_OK


def _evaluate_sweep(sweep: Path, test: bool) -> int:
    if test:
        raise UserError(
            f"--test is given with the sweep {relative(sweep)}.",
            "a run that was chosen by its test rows has no rows left that measure it.",
            f"choose by `packhorse evaluate {relative(sweep)}`, then evaluate that run alone with --test.",
        )
    console = open_console()
    show_sweep_evaluation(evaluate_sweep(sweep, lambda line: print_plain(line, console)), console)
    return EXIT_OK


def chat(run: str) -> int:
    """Chat with the run's tuned model until /exit."""
    plan = open_run(run)
    require_data(plan)
    subject, tokenizer = subject_of(plan)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    run_chat(ChatSession(load_tuned(subject), tokenizer), input, write)
    return EXIT_OK
