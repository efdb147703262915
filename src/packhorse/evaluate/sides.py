"""The two sides of a comparison, and where each is measured: in this process, by launched ranks, or by an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.answer_cache import AnswerCache
from packhorse.evaluate.distributed.exchange import NO_ROWS
from packhorse.evaluate.distributed.over_ranks import Launcher
from packhorse.evaluate.endpoint import EndpointClient
from packhorse.evaluate.endpoint_answers import endpoint_answers
from packhorse.evaluate.held_out import HeldOut
from packhorse.evaluate.measure import MeasureBoth, Measured, Work, measure, work_on
from packhorse.evaluate.models import TUNED, Subject, fingerprints, load_base, load_tuned
from packhorse.evaluate.score import Loss
from packhorse.recipe.evaluation import EvaluationSection

NO_LOSS: Final = Loss(0.0, 0)


@dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Attributes:
        subject: Models of the run that the model belongs to.
        name: `base`, `tuned`, or the folder of a model that replaces the base.
        tokenizer: Tokenizer of the model.
        cache: Known answers.
        launcher: Launches ranks that measure; None for this process.
        endpoint: Answers in place of the weights; None for the weights.
        tokenizer_folder: Folder of the tokenizer; None for that of the run.
    """

    subject: Subject
    name: str
    tokenizer: PreTrainedTokenizerBase
    cache: AnswerCache
    launcher: Launcher | None = None
    endpoint: EndpointClient | None = None
    tokenizer_folder: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the model's weights."""
        base, tuned = fingerprints(self.subject)
        return tuned if self.name == TUNED else base


def measure_sides(base: Side, tuned: Side, settings: EvaluationSection) -> MeasureBoth:
    """Return the function that measures both sides of a comparison.

    Args:
        base: The model that is compared with.
        tuned: The tuned model.
        settings: Section of the recipe, with the length of an answer.
    """
    with_losses = not loss_note(base, tuned)

    def measured(sets: Sequence[HeldOut]) -> tuple[Sequence[Measured], Sequence[Measured]]:
        is_one_load = base.subject is tuned.subject and tuned.subject.is_adapter
        if is_one_load and tuned.launcher is not None and not (base.endpoint or tuned.endpoint):
            work = [work_on(held_out, tuned.tokenizer, settings) for held_out in sets]
            both = {side.name: side.fingerprint for side in (base, tuned)}
            of_base, of_tuned = tuned.launcher.measure(both, work)
            return of_base, of_tuned
        of_base, of_tuned = (_measure_side(side, sets, settings, with_losses) for side in (base, tuned))
        return of_base, of_tuned

    return measured


def loss_note(base: Side, tuned: Side) -> str:
    """Return why losses are not measured; empty where they are."""
    if base.endpoint and tuned.endpoint:
        return "losses are not measured: both models answer at endpoints, and no weights are loaded."
    if not same_tokens(base.tokenizer, tuned.tokenizer):
        return "losses are not measured: the tokenizers differ, and a loss per token would have two units."
    return ""


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers have the same tokens."""
    return one is other or one.get_vocab() == other.get_vocab()


def _measure_side(
    side: Side, sets: Sequence[HeldOut], settings: EvaluationSection, with_losses: bool
) -> list[Measured]:
    work = [work_on(held_out, side.tokenizer, settings) for held_out in sets]
    asked = [each if side.endpoint is None else replace(each, prompts=[], limits=[]) for each in work]
    measured = _measure_weights(
        side, [each if with_losses else replace(each, documents=NO_ROWS, labels=None, rejected=None) for each in asked]
    )
    results = []
    for held_out, each, found in zip(sets, work, measured, strict=True):
        losses, answers = found.losses, found.answers
        if not with_losses:
            losses = [NO_LOSS] * held_out.documents.num_documents
        if side.endpoint is not None:
            answers = endpoint_answers(side.endpoint, side.tokenizer, held_out.questions, each.limits, side.cache)
        results.append(Measured(losses, answers, found.labels, found.rejected))
    return results


def _measure_weights(side: Side, work: Sequence[Work]) -> list[Measured]:
    if not any(each.documents.num_documents or each.prompts for each in work):
        return [Measured([], []) for _ in work]
    if side.launcher is not None:
        (results,) = side.launcher.measure({side.name: side.fingerprint}, work, side.tokenizer_folder)
        return results
    model = load_tuned(side.subject) if side.name == TUNED else load_base(side.subject)
    return measure(model, side.tokenizer, work, cache=side.cache, weights=side.fingerprint)
