"""`packhorse evaluate` and `packhorse chat`: what training made, beside what it started from."""

from __future__ import annotations

import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packhorse.commands.prepared import require_data
from packhorse.data.data_manifest import TestLook
from packhorse.data.packs.store import SEALED_SPLIT
from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.data.seal import looks_at, open_test
from packhorse.errors import EXIT_OK, UserError
from packhorse.evaluate.chat import ChatSession
from packhorse.evaluate.chat import chat as run_chat
from packhorse.evaluate.compare import Comparison, compare
from packhorse.evaluate.held_out import HeldOut, held_out_of, read_sets
from packhorse.evaluate.models import Subject, load_tuned
from packhorse.evaluate.show import render
from packhorse.evaluate.turns import trained_form
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import EVALUATION_FILE, TEST_EVALUATION_FILE
from packhorse.train.checkpoint.weights import weights_folder_name
from packhorse.train.setup import base_request


def _quiet() -> None:
    """Keeps libraries' bars and their words to each other off the user's table."""
    transformers_logging.disable_progress_bar()
    # peft asks transformers for a name that transformers has renamed; nothing for a user to mend.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def evaluate(run: str, test: bool = False, again: bool = False) -> int:
    """Compares base and tuned model on the run's held-out rows; keeps the result in the run folder.

    Args:
        run: Name or folder of the run.
        test: Measure the sealed test rows, into evaluation-test.json.
        again: Open them although they were opened before.
    """
    plan = open_run(run)
    comparison = evaluate_test(plan, again) if test else evaluate_run(plan)
    console = Console()
    console.print(render(comparison))
    kept = Path(plan.run_folder) / (TEST_EVALUATION_FILE if test else EVALUATION_FILE)
    console.print(f"kept as {kept}", soft_wrap=True, highlight=False, style="dim")
    return EXIT_OK


def evaluate_run(plan: RunPlan) -> Comparison:
    """The comparison on validation and retain rows, also written into the run folder.

    Raises:
        UserError: The run has not finished, or there are no held-out rows.
    """
    subject, tokenizer = _subject(plan)
    data_folder = Path(require_data(plan).folder)
    sets = read_sets(data_folder, plan.recipe.evaluation, trained_form(tokenizer, plan.recipe.data))
    return _compared(plan, subject, tokenizer, sets, looks_at(data_folder), EVALUATION_FILE)


def evaluate_test(plan: RunPlan, again: bool = False) -> Comparison:
    """The comparison on the sealed test rows, also written into the run folder; the look counts before they are read.

    Raises:
        UserError: The run has not finished, there are no test rows, or they were opened before.
    """
    # First what can fail without a look: a run that has not finished does not open the test set.
    subject, tokenizer = _subject(plan)
    form = trained_form(tokenizer, plan.recipe.data)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    documents, looks = open_test(Path(require_data(plan).folder), Path(plan.run_folder).name, now, again)
    held_out = held_out_of(documents, SEALED_SPLIT, plan.recipe.evaluation, form)
    return _compared(plan, subject, tokenizer, [held_out], looks, TEST_EVALUATION_FILE)


def _compared(
    plan: RunPlan,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    sets: list[HeldOut],
    looks: tuple[TestLook, ...],
    file: str,
) -> Comparison:
    found = compare(subject, tokenizer, sets, plan.recipe.evaluation)
    comparison = found.model_copy(update={"test_looks": looks})
    path = Path(plan.run_folder) / file
    path.write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return comparison


def chat(run: str) -> int:
    """Talks to the run's tuned model until /exit."""
    subject, tokenizer = _subject(open_run(run))

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    run_chat(ChatSession(load_tuned(subject), tokenizer), input, write)
    return EXIT_OK


def _subject(plan: RunPlan) -> tuple[Subject, PreTrainedTokenizerBase]:
    _quiet()
    data = require_data(plan)
    tuned = Path(plan.run_folder) / weights_folder_name(plan)
    if not tuned.is_dir():
        raise UserError(
            f"{relative(plan.run_folder)} has no {tuned.name} folder.",
            "training writes its result there when it ends.",
            f"let the run finish: packhorse resume {relative(plan.run_folder)}.",
        )
    tokenizer = tokenizer_of(plan.recipe, Path(data.tokenizer))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(
        base=base_request(plan, device, tokenizer, attention="sdpa"),
        tuned=tuned,
        vocab_size=len(tokenizer),
    )
    return subject, tokenizer
