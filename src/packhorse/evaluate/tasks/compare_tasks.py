"""Compare base and tuned model on benchmark tasks: lm-eval scores each row, and our paired statistics give verdicts."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from packhorse.data.checks.duplicates import near_groups
from packhorse.data.checks.words import signatures
from packhorse.errors import UserError
from packhorse.evaluate.compare import Evaluation
from packhorse.evaluate.held_out import NEAR_COPY
from packhorse.evaluate.metrics.metric import END_OF_THINKING, Metric
from packhorse.evaluate.models import Model, Subject, measure_both
from packhorse.evaluate.results import ComparisonLine, Score
from packhorse.evaluate.verdict import MetricValues, adjusted, gate_results, metric_result
from packhorse.recipe.evaluation import EvaluationSection

BATCH_SIZE: Final = 16
FEWSHOT_SEED: Final = 1234
"""lm-eval's default."""
SHARES: Final = ("acc", "acc_norm", "exact_match")
"""Metrics of lm-eval that are 0 or 1 on a row."""
NO_SCORE: Final = Score(loss=math.nan, num_supervised_tokens=0, num_exact=0, num_answered=0)
Row = dict[str, Any]
"""A sample of lm-eval: doc, doc_hash, filter, names of metrics, and the value of each."""


@dataclass(frozen=True)
class MeasuredTasks:
    """Samples of both models by task."""

    tasks: Mapping[str, Any]
    base: dict[str, list[Row]]
    tuned: dict[str, list[Row]]


def measure_tasks(tasks: Mapping[str, Any], subject: Subject, tokenizer: PreTrainedTokenizerBase) -> MeasuredTasks:
    """Return the answers of base and tuned model to every row.

    Args:
        tasks: lm-eval's tasks by name.
        subject: The two models.
        tokenizer: Tokenizer with the chat template that training used.

    Raises:
        UserError: A choice is longer than the context of the model.
    """
    return MeasuredTasks(tasks, *measure_both(subject, lambda model, _: _rows_of(model, tokenizer, tasks)))


def with_tasks(evaluation: Evaluation, measured: MeasuredTasks, settings: EvaluationSection) -> Evaluation:
    """Return the evaluation with one line per task; p is adjusted for all lines together.

    Args:
        evaluation: Comparison on held-out rows.
        measured: Samples of both models.
        settings: Section of the recipe.
    """
    lines, records = [*evaluation.comparison.lines], [*evaluation.rows]
    for name, task in measured.tasks.items():
        line, of_task = _line(name, task, measured.base[name], measured.tuned[name], settings)
        lines.append(line)
        records += of_task
    whole = adjusted(lines)
    comparison = evaluation.comparison.model_copy(update={"lines": whole, "gate": gate_results(whole, settings)})
    return replace(evaluation, comparison=comparison, rows=records)


def _rows_of(model: Model, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the samples of each task, with the chat template if there is one."""
    is_chat = tokenizer.chat_template is not None
    log = logging.getLogger("lm_eval")
    log.setLevel(logging.ERROR)  # it warns that the model is not one that it has loaded
    lm = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets the padding token
        batch_size=BATCH_SIZE,
        add_bos_token=False if is_chat else None,  # the template writes its own
        think_end_token=END_OF_THINKING,
    )
    for name, task in tasks.items():
        _check_lengths(name, task, lm)
        task.set_fewshot_seed(FEWSHOT_SEED)
    log.setLevel(logging.WARNING)  # a prompt that is cut is worth a line
    results = evaluate(
        lm, {"tasks": dict(tasks)}, bootstrap_iters=0, apply_chat_template=is_chat, fewshot_as_multiturn=is_chat
    )
    samples: dict[str, list[Row]] = results["samples"]
    return samples


def _check_lengths(name: str, task: Any, lm: HFLM) -> None:  # noqa: ANN401
    """Refuse a choice that is longer than the context, on which lm-eval stops; a longer prompt is cut at its start."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(task.eval_docs, 1):
        longest = max(len(lm.tok_encode(f"{task.config.target_delimiter}{each}")) for each in task.doc_to_choice(doc))
        if longest > lm.max_length:
            raise UserError(
                f"row {number} of {name} has a choice of {longest} tokens; the model's context has {lm.max_length}.",
                "a choice is scored by the probabilities of all its tokens.",
                f"remove row {number} from the rows of {name}, or shorten its choices.",
            )


def _line(
    name: str,
    task: Any,  # noqa: ANN401
    base: Sequence[Row],
    tuned: Sequence[Row],
    settings: EvaluationSection,
) -> tuple[ComparisonLine, list[dict[str, Any]]]:
    """Return the results of a task, and one record per row."""
    of_base, of_tuned = dict(_keyed(base)), dict(_keyed(tuned))
    assert of_base.keys() == of_tuned.keys(), f"base and tuned model have different rows of {name}"
    documents = list(dict.fromkeys(key[:2] for key in of_base))
    filters = list(dict.fromkeys(key[2] for key in of_base))
    first = [of_base[*document, filters[0]] for document in documents]
    clusters = _clusters([f"{task.doc_to_text(row['doc'])} {_expected(task, row)}" for row in first], documents)
    values = []
    for chosen in filters:
        pairs = [(of_base[*document, chosen], of_tuned[*document, chosen]) for document in documents]
        values += [_values(task, metric, chosen, pairs) for metric in pairs[0][0]["metrics"]]
    everything = np.ones(len(documents), bool)
    results = [metric_result(each, each.tested(clusters, everything), settings.smallest_effect) for each in values]
    line = ComparisonLine(
        set=f"task:{name}",
        group=None,
        num_rows=len(documents),
        base=NO_SCORE,
        tuned=NO_SCORE,
        metrics=tuple(results),
    )
    records = []
    for at, (document, row) in enumerate(zip(documents, first)):
        record = {
            "set": line.set,
            "document": at,
            "row": at,
            "group": line.set,
            "cluster": clusters[at],
            "key": document[0],
            "prompt": str(task.doc_to_text(row["doc"])),
            "expected": _expected(task, row),
            "base/answer": _answer(task, row),
            "tuned/answer": _answer(task, of_tuned[*document, filters[0]]),
        }
        for each in values:
            record[f"base/{each.metric.name}"] = float(each.base[at])
            record[f"tuned/{each.metric.name}"] = float(each.tuned[at])
        records.append(record)
    return line, records


def _keyed(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, int, str], Row]]:
    """Yield hash of the row's content, number of the earlier rows with that hash, filter; and the row."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = (row["doc_hash"], row["filter"])
        yield (key[0], seen[key], key[1]), row
        seen[key] += 1


def _clusters(texts: Sequence[str], documents: Sequence[tuple[str, int]]) -> list[int]:
    """Return the cluster of each row: copies and near copies are not independent."""
    keys = np.array([[int(document[0][at : at + 16], 16) for at in (0, 16)] for document in documents], np.uint64)
    return [int(label) for label in near_groups(signatures(texts), keys, NEAR_COPY).labels]


def _values(task: Any, metric: str, chosen: str, pairs: Sequence[tuple[Row, Row]]) -> MetricValues:  # noqa: ANN401
    base, tuned = (np.array([float(pair[side][metric]) for pair in pairs]) for side in (0, 1))
    is_share = metric in SHARES and bool(np.isin(np.concatenate([base, tuned]), (0, 1)).all())
    described = Metric(
        metric if chosen == "none" else f"{metric} ({chosen})",
        "binary" if is_share else "graded",
        "%" if is_share else "value",
        lambda *_: math.nan,
        higher_is_better=task.higher_is_better().get(metric) is not False,
    )
    return MetricValues(described, np.arange(len(pairs)), base, tuned, np.ones(len(pairs)))


def _expected(task: Any, row: Row) -> str:  # noqa: ANN401
    """Return the expected answer as text; of several choices the right one."""
    target = row["target"]
    if task.config.doc_to_choice is not None and isinstance(target, int):
        return str(task.doc_to_choice(row["doc"])[target])
    return target if isinstance(target, str) else json.dumps(target, ensure_ascii=False, default=str)


def _answer(task: Any, row: Row) -> str:  # noqa: ANN401
    """Return the answer as text; of several choices the most likely one."""
    answers = row["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(row["doc"])
        return str(choices[max(range(len(choices)), key=lambda at: float(answers[at][0]))])
    return str(answers[0])
