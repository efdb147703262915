"""Compare base and tuned model on held-out rows: loss, perplexity, exact match, sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.generate import Answer, answers, template_answer
from packhorse.evaluate.held_out import HeldOut, Question
from packhorse.evaluate.models import Model, Subject, measure_both
from packhorse.evaluate.results import Comparison, ComparisonLine, Sample, Score
from packhorse.evaluate.score import Loss, document_losses, is_exact, total_loss
from packhorse.recipe.schema import EvaluationSection

NUM_SAMPLES: Final = 3
END_OF_THINKING: Final = "</think>"


@dataclass(frozen=True)
class _Measured:
    """Losses by row and answers by question of one model on one set."""

    losses: list[Loss]
    answers: list[Answer]


def compare(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[HeldOut],
    settings: EvaluationSection,
    batch_size: int = 64,
) -> Comparison:
    """Return the comparison of base and tuned model on held-out rows.

    Args:
        subject: The two models.
        tokenizer: Tokenizer with the chat template that training used.
        sets: One set of rows or more.
        settings: Section of the recipe: grouping, and the length of an answer.
        batch_size: Rows answered at once.

    Raises:
        UserError: Training has not written its result yet.
    """
    sets = [_with_written_calls(held_out, tokenizer) for held_out in sets]

    def measure(model: Model) -> list[_Measured]:
        return [_measure(model, tokenizer, held_out, settings.max_new_tokens, batch_size) for held_out in sets]

    base, tuned = measure_both(subject, measure)
    lines = [line for held_out, b, t in zip(sets, base, tuned) for line in _lines(held_out, b, t, settings.group_by)]
    samples = [sample for held_out, b, t in zip(sets, base, tuned) for sample in _samples(held_out, b, t)]
    return Comparison(lines=tuple(lines), samples=tuple(samples[:NUM_SAMPLES]))


def _with_written_calls(held_out: HeldOut, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Return the set with each tool call as the template writes it; a question without any text is dropped."""
    questions = []
    for question in held_out.questions:
        if not question.answer.get("tool_calls"):
            questions.append(question)
            continue
        text = template_answer(tokenizer, question.prompt, question.answer, question.tools)
        if text is not None:
            questions.append(replace(question, answer={**question.answer, "content": text}))
    return replace(held_out, questions=tuple(questions))


def _measure(
    model: Model, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, max_new_tokens: int, batch_size: int
) -> _Measured:
    prompts = [question.prompt for question in held_out.questions]
    tools = [question.tools for question in held_out.questions]
    limits = [_limit(tokenizer, question, max_new_tokens) for question in held_out.questions]
    measured = answers(model, tokenizer, prompts, limits, batch_size, tools)
    return _Measured(document_losses(model, held_out.documents), measured)


def _limit(tokenizer: PreTrainedTokenizerBase, question: Question, max_new_tokens: int) -> int:
    """Return the longest answer, in tokens: an untrained model never stops, and a longer answer is wrong anyway."""
    expected = (question.answer.get("reasoning_content") or "") + question.answer["content"]
    num_tokens = len(tokenizer(expected, add_special_tokens=False)["input_ids"])
    return min(max_new_tokens, 2 * num_tokens + 16)


def _lines(held_out: HeldOut, base: _Measured, tuned: _Measured, group_by: str | None) -> list[ComparisonLine]:
    groups: list[str | None] = [None, *sorted(set(held_out.groups))] if group_by else [None]
    return [
        ComparisonLine(
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
    return answer.ended and is_exact(_without_thinking(question.answer["content"]), _without_thinking(answer.text))


def _without_thinking(text: str) -> str:
    """Return the text after the thinking, which may differ between two right answers."""
    return text.rpartition(END_OF_THINKING)[2]


def _samples(held_out: HeldOut, base: _Measured, tuned: _Measured) -> list[Sample]:
    """Return samples; rows with different answers come first, and groups take turns."""
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
