"""Overfitting, from the figures of a run: the validation loss rises while the training loss falls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packhorse.recipe.evaluation import EvaluationSection
from packhorse.track.meter import Figures

NUM_RISEN = 2
"""Last evaluations that must be above the lowest one: a single one may be noise."""


@dataclass(frozen=True)
class _Evaluation:
    """Losses at one evaluation, nats per supervised token; `train` is the mean of the lines since the one before."""

    step: float
    epoch: float
    validation: float
    train: float


def overfitting(lines: Iterable[Figures], section: EvaluationSection) -> str:
    """Return since when a run overfits, and the losses; empty if it does not.

    It does if the last two evaluations are above the lowest one by more than `early_stopping.min_delta` (0 by default),
    and the training loss is lower than at the lowest one.

    Args:
        lines: Lines of metrics.jsonl, in order.
        section: Section of the recipe.
    """
    evaluations = _evaluations(lines)
    if len(evaluations) <= NUM_RISEN:
        return ""
    lowest, last = min(evaluations, key=lambda each: each.validation), evaluations[-1]
    min_delta = section.early_stopping.min_delta if section.early_stopping is not None else 0.0
    rises = all(each.validation > lowest.validation + min_delta for each in evaluations[-NUM_RISEN:])
    if not rises or not last.train < lowest.train:
        return ""
    return (
        f"since step {lowest.step:,} (epoch {lowest.epoch:.2f}): the validation loss rises from "
        f"{lowest.validation:.4f} to {last.validation:.4f}, while the training loss falls from "
        f"{lowest.train:.4f} to {last.train:.4f}; "
        f"the gap is {last.validation - last.train:.4f}"
    )


def _evaluations(lines: Iterable[Figures]) -> list[_Evaluation]:
    """Return the evaluations after the first step."""
    found: list[_Evaluation] = []
    losses: list[float] = []
    epoch = 0.0
    for line in lines:
        epoch = line.get("train/epoch", epoch)
        if "train/loss" in line:
            losses.append(line["train/loss"])
        if "evaluation/loss" in line and losses:
            found.append(_Evaluation(line["step"], epoch, line["evaluation/loss"], sum(losses) / len(losses)))
            losses = []
    return found
