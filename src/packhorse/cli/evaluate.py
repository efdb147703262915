"""`packhorse evaluate` and `packhorse chat`: the model that training made, compared with its base."""

from __future__ import annotations

import sys
from pathlib import Path

from packhorse.cli.show.text import open_console
from packhorse.errors import EXIT_NO_GO, EXIT_OK, UserError
from packhorse.evaluate.chat import ChatSession
from packhorse.evaluate.chat import chat as run_chat
from packhorse.evaluate.evaluate_run import subject_of
from packhorse.evaluate.models import load_tuned
from packhorse.evaluate.show import render
from packhorse.run_folder.folder import open_run
from packhorse.workflows.evaluate import evaluate_run, result_file
from packhorse.workflows.prepared_data import require_data


def evaluate(run: str, test: bool = False, again: bool = False, tasks: str = "") -> int:
    """Compare base and tuned model on the run's held-out rows, and keep the result in the run folder.

    Args:
        run: Folder or name of the run.
        test: Whether to measure the sealed test rows.
        again: Whether to open them although they were opened before.
        tasks: Task file of lm-eval, or folder of them, to measure too; empty for none.

    Returns:
        Exit code: 3 if a critical condition of `evaluation.gate` is not met.

    Raises:
        UserError: The run has not finished, there are no such rows, the test rows were opened before, or a task file
            has a mistake.
    """
    if again and not test:
        raise UserError(
            "--again is given without --test.",
            "only the test rows are sealed; the others may be measured any number of times.",
            "write --test --again, or remove --again.",
        )
    plan = open_run(run)
    console = open_console()
    comparison = evaluate_run(plan, test, again, Path(tasks) if tasks else None)
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
