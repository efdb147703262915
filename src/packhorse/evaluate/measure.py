"""What is measured of a model on held-out rows: the loss of each document, and the answer to each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.answer_cache import Answer, AnswerCache
from packhorse.evaluate.generate import answers_to, prompt_ids
from packhorse.evaluate.held_out import HeldOut, Question
from packhorse.evaluate.label_rows import LabelDocuments, label_documents, label_rows
from packhorse.evaluate.metrics.metric import Expected, without_thinking
from packhorse.evaluate.models import Model
from packhorse.evaluate.ranks import ALONE, Ranks
from packhorse.evaluate.score import Documents, Loss, document_losses
from packhorse.recipe.evaluation import EvaluationSection


@dataclass(frozen=True)
class Work:
    """What a model is measured on, in tokens.

    Attributes:
        documents: Documents whose loss is measured.
        prompts: Token ids of each chat, up to the start of the answer.
        limits: Largest number of new tokens, per prompt.
        labels: Each prompt with each label as its answer, if the answers are labels (`LabelDocuments`).
        rejected: Rejected answers of preference pairs.
    """

    documents: Documents
    prompts: Sequence[list[int]]
    limits: Sequence[int]
    labels: Documents | None = None
    rejected: Documents | None = None


@dataclass(frozen=True)
class Measured:
    """Losses by document and answers by question of one model on one set."""

    losses: list[Loss]
    answers: list[Answer]
    labels: list[Loss] | None = None
    """Losses of the labels, if the answers are labels."""
    rejected: list[Loss] | None = None
    """Losses of the rejected answers of preference pairs."""


MeasureBoth = Callable[[Sequence[HeldOut]], tuple[Sequence[Measured], Sequence[Measured]]]
"""Function from the sets to the results of base and tuned model, one per set."""


def work_on(held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSection) -> Work:
    """Return what a model with this tokenizer is measured on."""
    questions = held_out.questions
    return Work(
        documents=held_out.documents,
        prompts=[prompt_ids(tokenizer, question.prompt, question.tools) for question in questions],
        limits=[answer_limit(tokenizer, question, settings.max_new_tokens) for question in questions],
        labels=_label_documents(held_out, tokenizer) if settings.metrics == "auto" else None,
        rejected=held_out.rejected,
    )


def expected_of(question: Question) -> Expected:
    """Return the answer that a metric expects."""
    row = {"prompt": list(question.prompt), "answer": question.answer, "tools": list(question.tools)}
    return Expected(without_thinking(question.answer["content"]), bool(question.answer.get("tool_calls")), row)


def _label_documents(held_out: HeldOut, tokenizer: PreTrainedTokenizerBase) -> LabelDocuments | None:
    rows = label_rows([expected_of(question) for question in held_out.questions])
    return None if rows is None else label_documents(tokenizer, rows, held_out.questions)


def answer_limit(tokenizer: PreTrainedTokenizerBase, question: Question, max_new_tokens: int) -> int:
    """Return the longest answer, in tokens: an untrained model never stops, and a longer answer is wrong anyway."""
    expected = (question.answer.get("reasoning_content") or "") + question.answer["content"]
    num_tokens = len(tokenizer(expected, add_special_tokens=False)["input_ids"])
    return min(max_new_tokens, 2 * num_tokens + 16)


def measure(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    work: Sequence[Work],
    batch_size: int = 64,
    cache: AnswerCache | None = None,
    weights: str = "",
    ranks: Ranks = ALONE,
) -> list[Measured]:
    """Return losses and answers of a model, equal on every rank; a collective if there are several.

    Args:
        model: Model in eval mode.
        tokenizer: Tokenizer of the prompts.
        work: One item per set.
        batch_size: Rows answered at once by a rank.
        cache: Answers of an earlier evaluation.
        weights: Fingerprint of the weights of the model, part of the key of each answer.
        ranks: The processes that share the work.
    """
    return [
        Measured(
            answers=answers_to(model, tokenizer, each.prompts, each.limits, batch_size, cache, weights, ranks),
            losses=document_losses(model, each.documents, ranks),
            labels=None if each.labels is None else document_losses(model, each.labels, ranks),
            rejected=None if each.rejected is None else document_losses(model, each.rejected, ranks),
        )
        for each in work
    ]
