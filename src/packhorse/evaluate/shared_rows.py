"""Compare the tuned models of two evaluations on the rows that both answered, from their rows.parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pyarrow import ArrowException, Table, parquet

from packhorse.errors import UserError
from packhorse.evaluate.metrics.choose import METRICS
from packhorse.evaluate.metrics.metric import LOSS, Metric
from packhorse.evaluate.opinions import OPINION_METRICS
from packhorse.evaluate.results import MetricResult
from packhorse.evaluate.verdict import MetricValues, metric_result

TUNED: Final = "tuned/"
# An opinion compares a model with its own base, and not with another run.
NO_METRICS: Final = ("loss", "answer", "ended", *(metric.name for metric in OPINION_METRICS))
RowKey = tuple[str, str, int]
"""Set, hash of the content, and number of the earlier rows with the same content."""


@dataclass(frozen=True)
class SharedResult:
    """One metric on the shared rows of one set; `base` of the result is the first run, `tuned` the second."""

    set: str
    result: MetricResult


@dataclass(frozen=True)
class _Rows:
    """Rows of one evaluation: the table, and the line of each answered row."""

    table: Table
    line_of: dict[RowKey, int]

    def column(self, name: str, lines: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return float64 [rows]; NaN: no value."""
        return np.asarray(self.table[name].to_numpy(), np.float64)[lines]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of answers."""
        names = [name.removeprefix(TUNED) for name in self.table.column_names if name.startswith(TUNED)]
        return [name for name in names if name not in NO_METRICS]


def compare_shared(first: Path, second: Path, smallest_effect: float) -> list[SharedResult]:
    """Return the results of the second tuned model against the first, before the adjustment for their number.

    Args:
        first: rows.parquet of the first run.
        second: rows.parquet of the second run.
        smallest_effect: `evaluation.smallest_effect`, for the number of rows that would be needed.

    Raises:
        UserError: A file is missing or damaged, or the two have no row in common.
    """
    a, b = _read(first), _read(second)
    shared = [key for key in a.line_of if key in b.line_of]
    if not shared:
        raise UserError(
            f"the evaluations answered {len(a.line_of):,} and {len(b.line_of):,} rows, and none of them is in both.",
            "models are compared on equal rows of the same set; other data, another split or another system prompt "
            "makes other rows.",
            "evaluate both runs on the same rows: give them the same data.validation and data.split.",
        )
    results = []
    for name in dict.fromkeys(key[0] for key in shared):
        keys = [key for key in shared if key[0] == name]
        lines = [np.array([rows.line_of[key] for key in keys], np.int64) for rows in (a, b)]
        results += [SharedResult(name, result) for result in _results(a, b, lines[0], lines[1], smallest_effect)]
    return results


def _results(
    a: _Rows, b: _Rows, of_a: NDArray[np.int64], of_b: NDArray[np.int64], smallest_effect: float
) -> Iterator[MetricResult]:
    """Yield one result per metric that both evaluations have."""
    clusters = a.column("cluster", of_a).astype(np.int64)
    documents = np.arange(len(of_a))
    tokens = [rows.column("supervised_tokens", lines) for rows, lines in ((a, of_a), (b, of_b))]
    # With other tokenizers a loss per token has another unit.
    is_loss_comparable = bool((tokens[0] == tokens[1]).all())
    shared = [METRICS.get(name) or Metric(name, "graded", "value", LOSS.score) for name in a.metrics]
    for metric in [*([LOSS] if is_loss_comparable else []), *(each for each in shared if each.name in b.metrics)]:
        column = f"{TUNED}{metric.name}"
        weights = tokens[0] if metric is LOSS else np.ones(len(documents))
        values = MetricValues(metric, documents, a.column(column, of_a), b.column(column, of_b), weights)
        result = metric_result(values, values.tested(clusters.tolist(), np.ones(len(documents), bool)), smallest_effect)
        if result.num_pairs or metric is LOSS:
            yield result


def _read(file: Path) -> _Rows:
    """Return the rows of a file.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        table = parquet.read_table(file)
        keys = zip(table["set"].to_pylist(), table["key"].to_pylist(), strict=True)
        return _Rows(table, dict(_numbered(keys)))
    except (OSError, ArrowException, KeyError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UserError(
            f"{file} {reason}.",
            "it holds the answers by row, which a paired comparison needs.",
            "evaluate the run again with `packhorse evaluate RUN`.",
        ) from error


def _numbered(keys: Any) -> Iterator[tuple[RowKey, int]]:  # noqa: ANN401
    seen: Counter[tuple[str, str]] = Counter()
    for line, (name, key) in enumerate(keys):
        if key is not None:
            yield (name, key, seen[name, key]), line
            seen[name, key] += 1
