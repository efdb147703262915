"""Load base and tuned model of a finished run, and compare them on its held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packhorse.data.data_manifest import TestLook
from packhorse.data.packs.store import SEALED_SPLIT
from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.data.seal import looks_at, open_test
from packhorse.errors import UserError
from packhorse.evaluate.answer_cache import AnswerCache
from packhorse.evaluate.compare import Evaluation, compare
from packhorse.evaluate.held_out import held_out_of, read_sets, trained_form
from packhorse.evaluate.models import Subject
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import ANSWERS_FILE, EVALUATION_FOLDER
from packhorse.train.checkpoint.weights import weights_folder_name
from packhorse.train.setup import base_request


def compare_on_held_out(plan: RunPlan) -> Evaluation:
    """Return the comparison on validation and retain rows.

    Raises:
        UserError: The run has not finished, or there are no held-out rows.
    """
    subject, tokenizer = subject_of(plan)
    folder = _data_folder(plan)
    sets = read_sets(folder, plan.recipe.evaluation, trained_form(tokenizer, plan.recipe.data))
    return _with_looks(compare(subject, tokenizer, sets, plan.recipe.evaluation, cache=_cache(plan)), looks_at(folder))


def compare_on_test(plan: RunPlan, again: bool = False) -> Evaluation:
    """Return the comparison on the sealed test rows. Their opening is recorded before they are read.

    Args:
        plan: Plan of a finished run.
        again: Whether to open them although they were opened before.

    Raises:
        UserError: The run has not finished, there are no test rows, or they were opened before.
    """
    # First what can fail: a run that has not finished does not open the test rows.
    subject, tokenizer = subject_of(plan)
    form = trained_form(tokenizer, plan.recipe.data)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    documents, looks = open_test(_data_folder(plan), Path(plan.run_folder).name, now, again)
    held_out = held_out_of(documents, SEALED_SPLIT, plan.recipe.evaluation, form)
    return _with_looks(compare(subject, tokenizer, [held_out], plan.recipe.evaluation, cache=_cache(plan)), looks)


def _cache(plan: RunPlan) -> AnswerCache:
    return AnswerCache(Path(plan.run_folder) / EVALUATION_FOLDER / ANSWERS_FILE)


def _with_looks(evaluation: Evaluation, looks: Sequence[TestLook]) -> Evaluation:
    comparison = evaluation.comparison.model_copy(update={"test_looks": tuple(looks)})
    return replace(evaluation, comparison=comparison)


def subject_of(plan: RunPlan) -> tuple[Subject, PreTrainedTokenizerBase]:
    """Return base and tuned model of a run, not loaded yet, and its tokenizer.

    Raises:
        UserError: The run has not finished.
    """
    _silence_libraries()
    if plan.recipe.objective.kind == "reward":
        raise UserError(
            f"{relative(plan.run_folder)} trained a reward model.",
            "it scores answers and writes none, so there is no answer of base and tuned model to compare.",
            f"see evaluation/accuracy of its validation pairs: packhorse status {relative(plan.run_folder)}",
        )
    tuned = Path(plan.run_folder) / weights_folder_name(plan)
    if not tuned.is_dir():
        raise UserError(
            f"{relative(plan.run_folder)} has no {tuned.name} folder.",
            "training writes its result there when it ends.",
            f"let the run finish: packhorse resume {relative(plan.run_folder)}.",
        )
    assert plan.data is not None
    tokenizer = tokenizer_of(plan.recipe, Path(plan.data.tokenizer))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = base_request(plan, device, tokenizer, attention="sdpa")
    return Subject(base=base, tuned=tuned, vocab_size=len(tokenizer)), tokenizer


def _data_folder(plan: RunPlan) -> Path:
    assert plan.data is not None
    return Path(plan.data.folder)


def _silence_libraries() -> None:
    """Keep progress bars and internal warnings of libraries out of the user's table."""
    transformers_logging.disable_progress_bar()
    # peft asks transformers for a name that transformers has renamed; a user cannot fix that.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
