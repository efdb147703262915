"""What is measured of a model on held-out rows: the loss of each document, and the answer to each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.answer_cache import Answer, AnswerCache
from packhorse.evaluate.generate import answers_to, prompt_ids
from packhorse.evaluate.held_out import HeldOut, Question
from packhorse.evaluate.models import Model
from packhorse.evaluate.ranks import ALONE, Ranks
from packhorse.evaluate.score import Documents, Loss, document_losses


@dataclass(frozen=True)
class Work:
    """What a model is measured on, in tokens.

    Attributes:
        documents: Documents whose loss is measured.
        prompts: Token ids of each chat, up to the start of the answer.
        limits: Largest number of new tokens, per prompt.
    """

    documents: Documents
    prompts: Sequence[list[int]]
    limits: Sequence[int]


@dataclass(frozen=True)
class Measured:
    """Losses by document and answers by question of one model on one set."""

    losses: list[Loss]
    answers: list[Answer]


MeasureBoth = Callable[[Sequence[HeldOut]], tuple[Sequence[Measured], Sequence[Measured]]]
"""Function from the sets to the results of base and tuned model, one per set."""


def work_on(held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Work:
    """Return what a model with this tokenizer is measured on."""
    questions = held_out.questions
    return Work(
        documents=held_out.documents,
        prompts=[prompt_ids(tokenizer, question.prompt, question.tools) for question in questions],
        limits=[answer_limit(tokenizer, question, max_new_tokens) for question in questions],
    )


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
        )
        for each in work
    ]
