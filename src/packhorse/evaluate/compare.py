"""Base beside tuned model on held-out rows: loss, perplexity, exact match, sample answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, computed_field
from transformers import PreTrainedTokenizerBase

from packhorse.errors import UserError
from packhorse.evaluate.generate import Answer, answers
from packhorse.evaluate.held_out import HeldOut, Question, read_held_out
from packhorse.evaluate.models import Model, Subject, measure_both
from packhorse.evaluate.score import Loss, document_losses, is_exact, total_loss
from packhorse.recipe.schema import EvaluationSection
from packhorse.track.meter import perplexity

SETS: Final = ("validation", "retain")
NUM_SAMPLES: Final = 3


class _Frozen(BaseModel):
    # NaN and infinity have no place in JSON; as strings they come back as what they were.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Score(_Frozen):
    """One model on one line's rows."""

    loss: float
    """Nats per supervised token; NaN where nothing is supervised."""
    num_supervised_tokens: int
    num_exact: int
    """Rows answered with exactly the expected text."""
    num_answered: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exact_match(self) -> float | None:
        """Share of the answered rows, 0 to 1; None where none was answered."""
        return self.num_exact / self.num_answered if self.num_answered else None


class Line(_Frozen):
    """Base and tuned model on the same rows."""

    set: str
    group: str | None
    """None for the whole set."""
    num_rows: int
    base: Score
    tuned: Score

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_change(self) -> float:
        """Tuned − base, nats per supervised token."""
        return self.tuned.loss - self.base.loss

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exact_match_change(self) -> float | None:
        """Tuned − base, from −1 to 1; None where no row was answered."""
        if self.tuned.exact_match is None or self.base.exact_match is None:
            return None
        return self.tuned.exact_match - self.base.exact_match


class Sample(_Frozen):
    """One row and both answers."""

    set: str
    group: str
    prompt: str
    """The last turn before the answer."""
    expected: str
    base: str
    tuned: str


class Comparison(_Frozen):
    """What training changed."""

    lines: tuple[Line, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class _Measured:
    """One model on one set: losses by row, answers by question."""

    losses: list[Loss]
    answers: list[Answer]


def compare(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    data_folder: Path,
    settings: EvaluationSection,
    batch_size: int = 64,
) -> Comparison:
    """Measures base and tuned model on the validation rows and, where there are any, on the retain rows.

    Args:
        subject: The two models.
        tokenizer: With the chat template that training used.
        data_folder: Prepared data, with data.json.
        settings: Of the recipe: what makes the lines, how many rows are answered, how long an answer may be.
        batch_size: Rows answered at once.

    Raises:
        UserError: There are no held-out rows, or training has not left its result yet.
    """
    found = [read_held_out(data_folder, name, settings.group_by, settings.exact_match_rows) for name in SETS]
    sets = [held_out for held_out in found if held_out is not None]
    if not sets:
        raise UserError(
            f"{data_folder} has 0 validation rows and 0 retain rows.",
            "a model is judged on rows that it was not trained on.",
            "raise data.split.validation, or name rows in data.validation, and train again.",
        )

    def measure(model: Model) -> list[_Measured]:
        return [_measure(model, tokenizer, held_out, settings.max_new_tokens, batch_size) for held_out in sets]

    base, tuned = measure_both(subject, measure)
    lines = [line for held_out, b, t in zip(sets, base, tuned) for line in _lines(held_out, b, t, settings.group_by)]
    samples = [sample for held_out, b, t in zip(sets, base, tuned) for sample in _samples(held_out, b, t)]
    return Comparison(lines=tuple(lines), samples=tuple(samples[:NUM_SAMPLES]))


def _measure(
    model: Model, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, max_new_tokens: int, batch_size: int
) -> _Measured:
    prompts = [question.prompt for question in held_out.questions]
    limits = [_limit(tokenizer, question, max_new_tokens) for question in held_out.questions]
    said = answers(model, tokenizer, prompts, limits, batch_size)
    return _Measured(document_losses(model, held_out.documents), said)


def _limit(tokenizer: PreTrainedTokenizerBase, question: Question, max_new_tokens: int) -> int:
    """An untrained model never stops; twice the expected answer is enough to know that it is another one."""
    num_tokens = len(tokenizer(question.expected, add_special_tokens=False)["input_ids"])
    return min(max_new_tokens, 2 * num_tokens + 16)


def _lines(held_out: HeldOut, base: _Measured, tuned: _Measured, group_by: str | None) -> list[Line]:
    groups: list[str | None] = [None, *sorted(set(held_out.groups))] if group_by else [None]
    return [
        Line(
            set=held_out.name,
            group=group,
            num_rows=sum(group in (None, of_row) for of_row in held_out.groups),
            base=_score(held_out, base, group),
            tuned=_score(held_out, tuned, group),
        )
        for group in groups
    ]


def _score(held_out: HeldOut, measured: _Measured, group: str | None) -> Score:
    loss = total_loss(loss for of_row, loss in zip(held_out.groups, measured.losses) if group in (None, of_row))
    judged = [
        _is_right(question, answer)
        for question, answer in zip(held_out.questions, measured.answers)
        if group in (None, held_out.groups[question.row])
    ]
    return Score(
        loss=loss.nats_per_token,
        num_supervised_tokens=loss.num_supervised_tokens,
        num_exact=sum(judged),
        num_answered=len(judged),
    )


def _is_right(question: Question, answer: Answer) -> bool:
    return answer.ended and is_exact(question.expected, answer.text)


def _samples(held_out: HeldOut, base: _Measured, tuned: _Measured) -> list[Sample]:
    """Rows where the models differ come first, each group's first before any group's second."""
    both = sorted(
        zip(held_out.questions, base.answers, tuned.answers),
        key=lambda row: row[1].text.strip() == row[2].text.strip(),
    )
    return [_sample(held_out, *row) for row in both]


def _sample(held_out: HeldOut, question: Question, base: Answer, tuned: Answer) -> Sample:
    return Sample(
        set=held_out.name,
        group=held_out.groups[question.row],
        prompt=question.prompt[-1]["content"],
        expected=question.expected,
        base=base.text,
        tuned=tuned.text,
    )
