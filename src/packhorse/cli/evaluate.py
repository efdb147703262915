"""`packhorse evaluate` and `packhorse chat`: the model that training made, compared with its base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from packhorse.cli.show.progress import row_progress
from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_NO_GO, EXIT_OK, UserError
from packhorse.evaluate.chat import ChatSession
from packhorse.evaluate.chat import chat as run_chat
from packhorse.evaluate.evaluate_run import subject_of
from packhorse.evaluate.models import load_tuned
from packhorse.evaluate.show import render
from packhorse.run_folder.folder import open_run
from packhorse.workflows.evaluate import evaluate_run, result_file
from packhorse.workflows.judge import judge_run, judge_settings
from packhorse.workflows.prepared_data import require_data


def evaluate(
    run: str, overrides: Sequence[str] = (), test: bool = False, again: bool = False, judge: bool = False
) -> int:
    """Compare base and tuned model on the run's held-out rows, and keep the result in the run folder.

    A judge gets the answers of the evaluation that is there; without one the models are evaluated first.

    Returns:
        Exit code: 3 if a critical condition of `evaluation.gate` is not met.

    Raises:
        UserError: The run has not finished, there are no such rows, the test rows were opened before, or the judge
            cannot be asked.
    """
    if again and not test:
        raise UserError(
            "--again is given without --test.",
            "only the test rows are sealed; the others may be measured any number of times.",
            "write --test --again, or remove --again.",
        )
    if overrides and not judge:
        raise UserError(
            f"{overrides[0]} is given without --judge.",
            "a run is evaluated by its recipe; only the judge may be another one.",
            f"remove {overrides[0]}, or write --judge.",
        )
    plan = open_run(run)
    console = open_console()
    settings = judge_settings(plan, overrides) if judge else None
    if settings is None or again or not result_file(Path(plan.run_folder), test).is_file():
        comparison = evaluate_run(plan, test, again)
    if settings is not None:
        with row_progress("replies of the judge") as show:
            comparison = judge_run(plan, settings, test, lambda text: print_plain(text, console), show)
    console.print(render(comparison))
    console.print(f"saved as {result_file(Path(plan.run_folder), test)}", soft_wrap=True, highlight=False, style="dim")
    return EXIT_NO_GO if comparison.decision == "NO-GO" else EXIT_OK


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
