"""Load base and tuned model of a finished run, and compare them on its held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from packhorse.evaluate.against import folder_side, shared_sets
from packhorse.evaluate.answer_cache import AnswerCache
from packhorse.evaluate.compare import Evaluation, compare
from packhorse.evaluate.distributed.over_ranks import Launcher
from packhorse.evaluate.endpoint import EndpointClient
from packhorse.evaluate.held_out import HeldOut, held_out_of, read_sets, trained_form
from packhorse.evaluate.models import BASE, TUNED, Subject
from packhorse.evaluate.sides import Side, loss_note, measure_sides
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import ANSWERS_FILE, EVALUATION_FOLDER
from packhorse.train.checkpoint.weights import weights_folder_name
from packhorse.train.setup import base_request


@dataclass(frozen=True)
class Means:
    """Where the models are measured, and what the tuned model is compared with.

    Attributes:
        launcher: Launches the ranks that measure the models of a run; None where this process measures them.
        endpoint: Answers in place of the tuned model's weights.
        base_endpoint: Answers in place of the base's weights.
        against: Run whose tuned model replaces the base, or folder of a model that does; None for the base.
    """

    launcher: Callable[[RunPlan], Launcher | None] = lambda _: None
    endpoint: EndpointClient | None = None
    base_endpoint: EndpointClient | None = None
    against: RunPlan | Path | None = None


def compare_on_held_out(plan: RunPlan, means: Means = Means()) -> Evaluation:
    """Return the comparison on validation and retain rows.

    Args:
        plan: Plan of a finished run.
        means: Where the models are measured.

    Raises:
        UserError: The run has not finished, or there are no held-out rows.
    """
    subject, tokenizer = subject_of(plan)
    folder = _data_folder(plan)
    sets = read_sets(folder, plan.recipe.evaluation, trained_form(tokenizer, plan.recipe.data))
    return _with_looks(_compared(plan, subject, tokenizer, sets, means), looks_at(folder))


def compare_on_test(plan: RunPlan, again: bool = False, means: Means = Means()) -> Evaluation:
    """Return the comparison on the sealed test rows. Their opening is recorded before they are read.

    Args:
        plan: Plan of a finished run.
        again: Whether to open them although they were opened before.
        means: Where the models are measured.

    Raises:
        UserError: The run has not finished, there are no test rows, or they were opened before.
    """
    # First what can fail: a run that has not finished does not open the test rows.
    subject, tokenizer = subject_of(plan)
    form = trained_form(tokenizer, plan.recipe.data)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    documents, looks = open_test(_data_folder(plan), Path(plan.run_folder).name, now, again)
    held_out = held_out_of(documents, SEALED_SPLIT, plan.recipe.evaluation, form)
    return _with_looks(_compared(plan, subject, tokenizer, [held_out], means), looks)


def _compared(
    plan: RunPlan, subject: Subject, tokenizer: PreTrainedTokenizerBase, sets: Sequence[HeldOut], means: Means
) -> Evaluation:
    settings, cache = plan.recipe.evaluation, answer_cache(plan)
    tuned = Side(subject, TUNED, tokenizer, cache, means.launcher(plan), means.endpoint)
    base = replace(tuned, name=BASE, endpoint=means.base_endpoint)
    if isinstance(means.against, Path):
        base = folder_side(means.against, tuned)
    elif means.against is not None:
        base, sets = _run_side(plan, means.against, sets, means)
    is_plain = base.name == BASE and not (tuned.launcher or tuned.endpoint or base.endpoint)
    measure = None if is_plain else measure_sides(base, tuned, settings)
    if means.against is not None:
        settings = settings.model_copy(update={"gate": []})  # its conditions are about the base
    evaluation = compare(subject, tokenizer, sets, settings, cache=cache, elsewhere=measure)
    found = {"reference": _reference(means), "notes": tuple(filter(None, [loss_note(base, tuned)]))}
    return replace(evaluation, comparison=evaluation.comparison.model_copy(update=found))


def _reference(means: Means) -> str:
    if means.against is None:
        return BASE
    return means.against.name if isinstance(means.against, Path) else Path(means.against.run_folder).name


def _run_side(plan: RunPlan, other: RunPlan, sets: Sequence[HeldOut], means: Means) -> tuple[Side, Sequence[HeldOut]]:
    """Return another run's tuned model as a side, and the rows that both runs hold out."""
    subject, tokenizer = subject_of(other)
    side = Side(subject, TUNED, tokenizer, answer_cache(other), means.launcher(other), means.base_endpoint)
    assert plan.data is not None
    assert other.data is not None
    if plan.data.content_hash == other.data.content_hash:
        return side, sets
    if sets[0].name == SEALED_SPLIT:
        raise UserError(
            f"{relative(plan.run_folder)} and {relative(other.run_folder)} were trained on different prepared data.",
            "the test rows of one run may be training rows of the other.",
            "compare them on validation rows: leave --test out.",
        )
    form = trained_form(tokenizer, other.recipe.data)
    return side, shared_sets(sets, read_sets(_data_folder(other), other.recipe.evaluation, form))


def answers_file(plan: RunPlan) -> Path:
    """Return the file of known answers of a run's models."""
    return Path(plan.run_folder) / EVALUATION_FOLDER / ANSWERS_FILE


def answer_cache(plan: RunPlan) -> AnswerCache:
    """Return the known answers of a run's models."""
    return AnswerCache(answers_file(plan))


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
