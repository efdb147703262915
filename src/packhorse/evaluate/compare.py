"""Base beside tuned model on held-out rows: loss, perplexity, exact match, sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from pydantic import BaseModel, ConfigDict, computed_field
from transformers import PreTrainedTokenizerBase

from packhorse.data.data_manifest import TestLook
from packhorse.evaluate.generate import Answer, answers, said_by_template
from packhorse.evaluate.held_out import HeldOut, Question
from packhorse.evaluate.models import Model, Subject, measure_both
from packhorse.evaluate.score import Loss, document_losses, is_exact, total_loss
from packhorse.recipe.schema import EvaluationSection
from packhorse.track.meter import perplexity

NUM_SAMPLES: Final = 3
END_OF_THINKING: Final = "</think>"


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
    test_looks: tuple[TestLook, ...] = ()
    """Each opening of the sealed test rows so far, by any run on the same data."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_test_looks(self) -> int:
        """How often the test rows were opened."""
        return len(self.test_looks)


@dataclass(frozen=True)
class _Measured:
    """One model on one set: losses by row, answers by question."""

    losses: list[Loss]
    answers: list[Answer]


def compare(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[HeldOut],
    settings: EvaluationSection,
    batch_size: int = 64,
) -> Comparison:
    """Measures base and tuned model on held-out rows.

    Args:
        subject: The two models.
        tokenizer: With the chat template that training used.
        sets: The rows, one set or more.
        settings: Of the recipe: what makes the lines, and how long an answer may be.
        batch_size: Rows answered at once.

    Raises:
        UserError: Training has not left its result yet.
    """
    asked = [_with_calls_written(held_out, tokenizer) for held_out in sets]

    def measure(model: Model) -> list[_Measured]:
        return [_measure(model, tokenizer, held_out, settings.max_new_tokens, batch_size) for held_out in asked]

    base, tuned = measure_both(subject, measure)
    lines = [line for held_out, b, t in zip(asked, base, tuned) for line in _lines(held_out, b, t, settings.group_by)]
    samples = [sample for held_out, b, t in zip(asked, base, tuned) for sample in _samples(held_out, b, t)]
    return Comparison(lines=tuple(lines), samples=tuple(samples[:NUM_SAMPLES]))


def _with_calls_written(held_out: HeldOut, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Expects of a tool call the text that the template makes of it; leaves out what it makes nothing of."""
    questions = []
    for question in held_out.questions:
        if not question.answer.get("tool_calls"):
            questions.append(question)
            continue
        said = said_by_template(tokenizer, question.prompt, question.answer, question.tools)
        if said is not None:
            questions.append(replace(question, answer={**question.answer, "content": said}))
    return replace(held_out, questions=tuple(questions))


def _measure(
    model: Model, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, max_new_tokens: int, batch_size: int
) -> _Measured:
    prompts = [question.prompt for question in held_out.questions]
    tools = [question.tools for question in held_out.questions]
    limits = [_limit(tokenizer, question, max_new_tokens) for question in held_out.questions]
    said = answers(model, tokenizer, prompts, limits, batch_size, tools)
    return _Measured(document_losses(model, held_out.documents), said)


def _limit(tokenizer: PreTrainedTokenizerBase, question: Question, max_new_tokens: int) -> int:
    """An untrained model never stops; twice the expected answer is enough to know that it is another one."""
    expected = (question.answer.get("reasoning_content") or "") + question.answer["content"]
    num_tokens = len(tokenizer(expected, add_special_tokens=False)["input_ids"])
    return min(max_new_tokens, 2 * num_tokens + 16)


def _lines(held_out: HeldOut, base: _Measured, tuned: _Measured, group_by: str | None) -> list[Line]:
    groups: list[str | None] = [None, *sorted(set(held_out.groups))] if group_by else [None]
    return [
        Line(
            set=held_out.name,
            group=group,
            num_rows=len({row for row, of_row in zip(held_out.rows, held_out.groups) if group in (None, of_row)}),
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
    return answer.ended and is_exact(_spoken(question.answer["content"]), _spoken(answer.text))


def _spoken(text: str) -> str:
    """Two ways of thinking may end in one answer."""
    return text.rpartition(END_OF_THINKING)[2]


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
        expected=question.answer["content"],
        base=base.text,
        tuned=tuned.text,
    )
