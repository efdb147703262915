"""Overfitting is reported where the validation loss rises while the training loss falls, and nowhere else."""

from __future__ import annotations

import pytest

from packhorse.recipe.evaluation import EvaluationSection
from packhorse.track.overfitting import overfitting


def lines(train: list[float], validation: list[float]) -> list[dict[str, float]]:
    """Two steps between evaluations, whose training losses lie 0.5 around the mean."""
    found = [{"step": 0, "evaluation/loss": 9.0}]
    for number, (mean, loss) in enumerate(zip(train, validation, strict=True), start=1):
        found.append({"step": 2 * number - 1, "train/loss": mean + 0.5, "train/epoch": number - 0.5})
        found.append({"step": 2 * number, "train/loss": mean - 0.5, "train/epoch": number, "evaluation/loss": loss})
    return found


@pytest.mark.parametrize(
    ("train", "validation", "min_delta", "is_overfitting"),
    [
        ([3, 2, 1, 0.5], [3.0, 2.0, 2.1, 2.2], 0.0, True),
        ([3, 2, 1, 0.5], [3.0, 2.0, 2.1, 2.2], 0.15, False),
        ([3, 2, 1], [3.0, 2.0, 2.1], 0.0, False),  # one evaluation may be noise
        ([3, 2, 2.5, 2.5], [3.0, 2.0, 2.1, 2.2], 0.0, False),  # both losses rise: training diverges
        ([3, 2, 1, 0.5], [3.0, 2.0, 1.9, 1.8], 0.0, False),
        ([], [], 0.0, False),
    ],
    ids=["overfits", "within min_delta", "once", "diverges", "learns", "no evaluation"],
)
def test_what_is_overfitting(train, validation, min_delta, is_overfitting) -> None:
    section = EvaluationSection(early_stopping={"patience": 9, "min_delta": min_delta})
    assert bool(overfitting(lines(train, validation), section)) == is_overfitting


def test_the_words_name_step_epoch_losses_and_gap() -> None:
    assert overfitting(lines([3, 2, 1, 0.5], [3.0, 2.0, 2.1, 2.2]), EvaluationSection()) == (
        "since step 4 (epoch 2.00): the validation loss rises from 2.0000 to 2.2000, while the training loss falls"
        " from 2.0000 to 0.5000; the gap is 1.7000"
    )
