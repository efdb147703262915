"""Compare base and tuned model on held-out rows: losses, metrics of answers with verdicts, sample answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.answer_cache import Answer, AnswerCache
from packhorse.evaluate.generate import answers, template_answer
from packhorse.evaluate.held_out import HeldOut, Question
from packhorse.evaluate.metrics.choose import kinds_of, metrics_for
from packhorse.evaluate.metrics.labels import classification, confusion_matrix, labels_of
from packhorse.evaluate.metrics.metric import LOSS, Expected, Metric, Reply
from packhorse.evaluate.metrics.text import EXACT
from packhorse.evaluate.models import Model, Subject, measure_both
from packhorse.evaluate.preference import preferences
from packhorse.evaluate.results import Comparison, ComparisonLine, LabelResult, MetricFailure, Sample, Score
from packhorse.evaluate.score import Loss, document_losses, total_loss
from packhorse.evaluate.verdict import MetricValues, adjusted, gate_results, metric_result
from packhorse.recipe.evaluation import EvaluationSection

NUM_SAMPLES: Final = 3
END_OF_THINKING: Final = "</think>"


@dataclass(frozen=True)
class Evaluation:
    """Comparison with what it rests on.

    Attributes:
        comparison: Summary.
        rows: One record per document with losses, and for answered rows prompt, answers and the value of each metric
            (`base/METRIC`, `tuned/METRIC`).
    """

    comparison: Comparison
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Measured:
    """Losses by document and answers by question of one model on one set."""

    losses: list[Loss]
    answers: list[Answer]
    rejected: list[Loss]


@dataclass(frozen=True)
class _Scored:
    """Values of all metrics on one set, by document (loss) or by question."""

    held_out: HeldOut
    base: _Measured
    tuned: _Measured
    values: list[MetricValues]
    failures: list[MetricFailure]


def compare(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[HeldOut],
    settings: EvaluationSection,
    batch_size: int = 64,
    cache: AnswerCache | None = None,
) -> Evaluation:
    """Return the comparison of base and tuned model on held-out rows.

    Args:
        subject: The two models.
        tokenizer: Tokenizer with the chat template that training used.
        sets: One set of rows or more.
        settings: Section of the recipe: metrics, grouping, gate, and the length of an answer.
        batch_size: Rows answered at once.
        cache: Answers of an earlier evaluation.

    Raises:
        UserError: Training has not written its result yet, or a metric of the user cannot be imported.
    """
    sets = [_with_written_calls(held_out, tokenizer) for held_out in sets]
    chosen = None if settings.metrics == "auto" else settings.metrics
    # Before the models are loaded: a metric that cannot be imported is found at once.
    metrics = [metrics_for([_expected(question) for question in held_out.questions], chosen) for held_out in sets]

    def measure(model: Model, weights: str) -> list[_Measured]:
        found = []
        for held_out in sets:
            prompts = [question.prompt for question in held_out.questions]
            tools = [question.tools for question in held_out.questions]
            limits = [_limit(tokenizer, question, settings.max_new_tokens) for question in held_out.questions]
            answered = answers(model, tokenizer, prompts, limits, batch_size, tools, cache, weights)
            rejected = document_losses(model, held_out.rejected) if held_out.rejected is not None else []
            found.append(_Measured(document_losses(model, held_out.documents), answered, rejected))
        return found

    base, tuned = measure_both(subject, measure)
    scored = [_scored(*of_set) for of_set in zip(sets, metrics, base, tuned)]
    lines = adjusted([line for of_set in scored for line in _lines(of_set, settings)])
    samples = [sample for held_out, b, t in zip(sets, base, tuned) for sample in _samples(held_out, b, t)]
    comparison = Comparison(
        lines=lines,
        samples=tuple(samples[:NUM_SAMPLES]),
        smallest_effect=settings.smallest_effect,
        gate=gate_results(lines, settings),
        failures=tuple(failure for of_set in scored for failure in of_set.failures),
    )
    return Evaluation(comparison, [record for of_set in scored for record in _records(of_set)])


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


def _limit(tokenizer: PreTrainedTokenizerBase, question: Question, max_new_tokens: int) -> int:
    """Return the longest answer, in tokens: an untrained model never stops, and a longer answer is wrong anyway."""
    expected = (question.answer.get("reasoning_content") or "") + question.answer["content"]
    num_tokens = len(tokenizer(expected, add_special_tokens=False)["input_ids"])
    return min(max_new_tokens, 2 * num_tokens + 16)


def _expected(question: Question) -> Expected:
    row = {"prompt": list(question.prompt), "answer": question.answer, "tools": list(question.tools)}
    return Expected(_without_thinking(question.answer["content"]), bool(question.answer.get("tool_calls")), row)


def _reply(answer: Answer) -> Reply:
    return Reply(_without_thinking(answer.text), answer.ended)


def _without_thinking(text: str) -> str:
    """Return the text after the thinking, which may differ between two right answers."""
    return text.rpartition(END_OF_THINKING)[2]


def _scored(held_out: HeldOut, metrics: Sequence[Metric], base: _Measured, tuned: _Measured) -> _Scored:
    expected = [_expected(question) for question in held_out.questions]
    at = np.array([question.row for question in held_out.questions], np.int64)
    tokens = np.array([loss.num_supervised_tokens for loss in base.losses], np.float64)
    measured = np.flatnonzero(tokens)
    losses = [
        np.array([of_model.losses[document].nats_per_token for document in measured]) for of_model in (base, tuned)
    ]
    values = [MetricValues(LOSS, measured, losses[0], losses[1], tokens[measured])]
    if held_out.rejected is not None:
        values.append(preferences((base.losses, tuned.losses), (base.rejected, tuned.rejected)))
    failures: list[MetricFailure] = []
    for metric in metrics:
        sides = []
        errors: dict[int, Exception] = {}
        for of_model in (base, tuned):
            replies = [_reply(answer) for answer in of_model.answers]
            sides.append(_values(metric, expected, replies, errors))
        values.append(MetricValues(metric, at, sides[0], sides[1], np.ones(len(at))))
        if errors:
            first = min(errors)
            failures.append(
                MetricFailure(
                    set=held_out.name,
                    metric=metric.name,
                    num_rows=len(errors),
                    first_row=held_out.questions[first].prompt[-1]["content"],
                    error=f"{type(errors[first]).__name__}: {errors[first]}",
                )
            )
    return _Scored(held_out, base, tuned, values, failures)


def _values(
    metric: Metric, expected: Sequence[Expected], replies: Sequence[Reply], errors: dict[int, Exception]
) -> NDArray[np.float64]:
    """Return float64 [questions]; a metric of the user that raises gives NaN, and its error is kept by row."""
    values = np.full(len(expected), math.nan)
    for row, (truth, reply) in enumerate(zip(expected, replies, strict=True)):
        try:
            values[row] = metric.score(truth, reply)
        except Exception as error:
            if ":" not in metric.name:
                raise
            errors[row] = error
    return values


def _lines(scored: _Scored, settings: EvaluationSection) -> list[ComparisonLine]:
    held_out = scored.held_out
    names = np.array(held_out.groups, dtype=object)
    groups: list[str | None] = [None, *sorted(set(held_out.groups))] if settings.group_by else [None]
    lines = []
    for group in groups:
        documents = np.ones(len(names), bool) if group is None else names == group
        # Of groups only the headline: a table of every metric by group is too long to read.
        values = scored.values if group is None else scored.values[:2]
        results = [
            metric_result(of_metric, of_metric.tested(held_out.clusters, documents), settings.smallest_effect)
            for of_metric in values
        ]
        lines.append(
            ComparisonLine(
                set=held_out.name,
                group=group,
                num_rows=len({row for row, inside in zip(held_out.rows, documents) if inside}),
                base=_score(scored, scored.base, documents),
                tuned=_score(scored, scored.tuned, documents),
                metrics=tuple(results),
                **(_labels(scored) if group is None else {}),
            )
        )
    return lines


def _score(scored: _Scored, measured: _Measured, documents: NDArray[np.bool_]) -> Score:
    loss = total_loss(loss for inside, loss in zip(documents, measured.losses) if inside)
    judged = [
        EXACT.score(_expected(question), _reply(answer))
        for question, answer in zip(scored.held_out.questions, measured.answers)
        if documents[question.row]
    ]
    return Score(
        loss=loss.nats_per_token,
        num_supervised_tokens=loss.num_supervised_tokens,
        num_exact=int(sum(judged)),
        num_answered=len(judged),
    )


def _labels(scored: _Scored) -> dict[str, LabelResult]:
    expected = [_expected(question) for question in scored.held_out.questions]
    texts = [answer.text for answer in expected]
    labels = labels_of(texts) if expected and kinds_of(expected) == ["label"] else None
    if labels is None:
        return {}

    def of(measured: _Measured) -> LabelResult:
        matrix = confusion_matrix(labels, texts, [_reply(answer) for answer in measured.answers])
        confusion = tuple(tuple(line) for line in matrix.tolist())
        return LabelResult(labels=labels, confusion=confusion, **asdict(classification(matrix)))

    return {"base_labels": of(scored.base), "tuned_labels": of(scored.tuned)}


def _records(scored: _Scored) -> list[dict[str, Any]]:
    held_out = scored.held_out
    records: list[dict[str, Any]] = [
        {
            "set": held_out.name,
            "document": document,
            "row": held_out.rows[document],
            "group": held_out.groups[document],
            "cluster": held_out.clusters[document],
            "supervised_tokens": base.num_supervised_tokens,
            "base/loss": base.nats_per_token,
            "tuned/loss": tuned.nats_per_token,
        }
        for document, (base, tuned) in enumerate(zip(scored.base.losses, scored.tuned.losses))
    ]
    for at, question in enumerate(held_out.questions):
        base, tuned = scored.base.answers[at], scored.tuned.answers[at]
        records[question.row] |= {
            "key": question.key,
            "prompt": question.prompt[-1]["content"],
            "expected": question.answer["content"],
            "base/answer": base.text,
            "base/ended": base.ended,
            "tuned/answer": tuned.text,
            "tuned/ended": tuned.ended,
        }
        for values in scored.values[1:]:
            records[question.row][f"base/{values.metric.name}"] = float(values.base[at])
            records[question.row][f"tuned/{values.metric.name}"] = float(values.tuned[at])
    return records


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
