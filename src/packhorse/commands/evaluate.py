"""`packhorse evaluate` and `packhorse chat`: what training made, beside what it started from."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packhorse.commands.plan import require_data
from packhorse.data.rendering.render import load_tokenizer
from packhorse.errors import EXIT_OK, UserError
from packhorse.evaluate.chat import ChatSession
from packhorse.evaluate.chat import chat as run_chat
from packhorse.evaluate.compare import Comparison, compare
from packhorse.evaluate.models import Subject, load_tuned
from packhorse.evaluate.show import render
from packhorse.launching.run_folder import open_run, relative
from packhorse.plan.run_plan import RunPlan
from packhorse.train.setup import base_request
from packhorse.train.weights import weights_folder_name

EVALUATION_FILE = "evaluation.json"


def _quiet() -> None:
    """Keeps libraries' bars and their words to each other off the user's table."""
    transformers_logging.disable_progress_bar()
    # peft asks transformers for a name that transformers has renamed; nothing for a user to mend.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def evaluate(run: str) -> int:
    """Compares base and tuned model on the run's held-out rows; keeps the result as RUN/evaluation.json."""
    plan = open_run(run)
    comparison = evaluate_run(plan)
    console = Console()
    console.print(render(comparison))
    console.print(f"kept as {Path(plan.run_folder) / EVALUATION_FILE}", soft_wrap=True, highlight=False, style="dim")
    return EXIT_OK


def evaluate_run(plan: RunPlan) -> Comparison:
    """The comparison, also written into the run folder.

    Raises:
        UserError: The run has not finished, or there are no held-out rows.
    """
    subject, tokenizer = _subject(plan)
    comparison = compare(subject, tokenizer, Path(require_data(plan).folder), plan.recipe.evaluation)
    file = Path(plan.run_folder) / EVALUATION_FILE
    file.write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
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
            f"let the run finish: packhorse train {relative(plan.run_folder)} --resume.",
        )
    tokenizer = load_tokenizer(Path(data.tokenizer), plan.recipe.data.template, plan.recipe.model.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(
        base=base_request(plan, device, tokenizer, attention="sdpa"),
        tuned=tuned,
        vocab_size=len(tokenizer),
    )
    return subject, tokenizer
