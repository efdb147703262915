"""`packhorse evaluate` and `packhorse chat`: the model that training made, compared with its base."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from packhorse.cli.show.progress import row_progress
from packhorse.cli.show.sweep_evaluation import show_sweep_evaluation
from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_NO_GO, EXIT_OK, UserError
from packhorse.evaluate.chat import ChatSession
from packhorse.evaluate.chat import chat as run_chat
from packhorse.evaluate.endpoint import EndpointClient
from packhorse.evaluate.evaluate_run import subject_of
from packhorse.evaluate.models import load_tuned
from packhorse.evaluate.show import render
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.sweep import find_sweep
from packhorse.workflows.evaluate import EvaluationRequest, evaluate_run, result_file
from packhorse.workflows.evaluate_sweep import evaluate_sweep
from packhorse.workflows.judge import judge_run, judge_settings
from packhorse.workflows.prepared_data import require_data


def evaluate(
    run: str,
    overrides: Sequence[str] = (),
    test: bool = False,
    again: bool = False,
    judge: bool = False,
    ranks: int | None = None,
    endpoint: str = "",
    model: str = "",
    base_endpoint: str = "",
    base_model: str = "",
    api_key_env: str = "",
    against: str = "",
    tasks: str = "",
) -> int:
    """Compare base and tuned model on the held-out rows of a run, or of each run of a sweep, and keep the result.

    A judge gets the answers of the evaluation that is there; without one the models are evaluated first.

    Returns:
        Exit code: 3 if a critical condition of `evaluation.gate` is not met.

    Raises:
        UserError: Flags contradict each other, the run has not finished, there are no such rows, the test rows were
            opened before, a task file has a mistake, or a model or the judge cannot be asked.
    """
    against = "" if against == "base" else against
    _check_flags(test, again, judge, overrides, against, tasks)
    sweep = find_sweep(run)
    if sweep is not None:
        asked = {
            "--judge": judge,
            "--ranks": ranks,
            "--endpoint": endpoint,
            "--base-model": base_model,
            "--against": against,
            "--tasks": tasks,
        }
        return _evaluate_sweep(sweep, test, [name for name, value in asked.items() if value])
    plan = open_run(run)
    console = open_console()
    settings = judge_settings(plan, overrides) if judge else None
    if settings is None or again or tasks or not result_file(Path(plan.run_folder), test).is_file():
        tuned, base = _endpoints(endpoint, model, base_endpoint, base_model, api_key_env)
        request = EvaluationRequest(test, again, ranks, tuned, base, against, Path(tasks) if tasks else None)
        comparison = evaluate_run(plan, request, partial(console.print, highlight=False, style="dim"))
    if settings is not None:
        with row_progress("replies of the judge") as show:
            comparison = judge_run(plan, settings, test, lambda text: print_plain(text, console), show)
    console.print(render(comparison))
    reference = comparison.reference if against else ""
    saved = result_file(Path(plan.run_folder), test, reference)
    console.print(f"saved as {saved}", soft_wrap=True, highlight=False, style="dim")
    return EXIT_NO_GO if comparison.decision == "NO-GO" else EXIT_OK


def _check_flags(test: bool, again: bool, judge: bool, overrides: Sequence[str], against: str, tasks: str) -> None:
    """Refuse flags that contradict each other."""
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
    for name, given, why in (
        ("--judge", judge, "a judge reads the stored answers of a run and its base."),
        ("--tasks", tasks, "tasks are measured on a run and its base."),
    ):
        if given and against:
            raise UserError(f"{name} is given with --against.", why, f"remove {name}, or --against {against}.")


def _endpoints(
    url: str, model: str, base_url: str, base_model: str, key_variable: str
) -> tuple[EndpointClient | None, EndpointClient | None]:
    """Return the clients of the tuned model and of the base; None where the weights answer.

    Raises:
        UserError: A flag lacks another one, or the environment variable is not set.
    """
    for name, value, needed, given in (
        ("--endpoint", url, "--model", model),
        ("--model", model, "--endpoint", url),
        ("--base-endpoint", base_url, "--base-model", base_model),
        ("--base-model", base_model, "--base-endpoint", base_url or url),
    ):
        if value and not given:
            raise UserError(
                f"{name} is given without {needed}.",
                "an endpoint is asked by its address and the name of the model there.",
                f"add {needed}; `curl URL/models` lists the names.",
            )
    if key_variable and key_variable not in os.environ:
        raise UserError(
            f"--api-key-env is {key_variable}, and no such environment variable is set.",
            "the key is read from it, so that it is in no command line.",
            f"export {key_variable}=…",
        )
    key = os.environ.get(key_variable) if key_variable else None
    tuned = EndpointClient(url, model, key) if url else None
    return tuned, EndpointClient(base_url or url, base_model, key) if base_model else None


def _evaluate_sweep(sweep: Path, test: bool, flags: Sequence[str]) -> int:
    if flags:
        raise UserError(
            f"{flags[0]} is given with the sweep {relative(sweep)}.",
            "a sweep is evaluated run by run, each beside its base, and then the runs beside the best.",
            f"remove {flags[0]}, or evaluate one run of it: {relative(sweep)}-1.",
        )
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
