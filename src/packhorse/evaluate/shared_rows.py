"""Compare the tuned models of two evaluations on the rows that both answered, from their rows.parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
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
    return compare_pooled([first], [second], smallest_effect)


def compare_pooled(first: Sequence[Path], second: Sequence[Path], smallest_effect: float) -> list[SharedResult]:
    """Return the results of the second models against the first; each side may be several runs, as of folds.

    Args:
        first: rows.parquet of each run of the first side.
        second: rows.parquet of each run of the second side.
        smallest_effect: `evaluation.smallest_effect`, for the number of rows that would be needed.

    Raises:
        UserError: A file is missing or damaged, or the two sides have no row in common.
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


def base_against_tuned(files: Sequence[Path], name: str, smallest_effect: float) -> list[MetricResult]:
    """Return the results of the tuned models against the base on all rows of one set, before the adjustment.

    The interval treats rows as independent; that folds share most of their train rows is not in it (Bengio & Grandvalet
    2004, JMLR 5).

    Args:
        files: rows.parquet of each run; of folds, each row is in one of them.
        name: Name of the set.
        smallest_effect: `evaluation.smallest_effect`, for the number of rows that would be needed.

    Raises:
        UserError: A file is missing or damaged.
    """
    rows = _read(files)
    here = np.array([each == name for each in rows.table["set"].to_pylist()])
    answered = np.array([key is not None for key in _keys(rows.table)])
    tokens = np.asarray(rows.table["supervised_tokens"].to_numpy(), np.float64)
    found = []
    for metric in [LOSS, *map(_metric, rows.metrics)]:
        lines = np.flatnonzero(here & ((tokens > 0) if metric is LOSS else answered))
        base, tuned = (rows.column(f"{model}/{metric.name}", lines) for model in ("base", "tuned"))
        weights = tokens[lines] if metric is LOSS else np.ones(len(lines))
        values = MetricValues(metric, np.arange(len(lines)), base, tuned, weights)
        clusters = rows.column("cluster", lines).astype(np.int64).tolist()
        found.append(metric_result(values, values.tested(clusters, np.ones(len(lines), bool)), smallest_effect))
    return found


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(name, "graded", "value", LOSS.score)


def _results(
    a: _Rows, b: _Rows, of_a: NDArray[np.int64], of_b: NDArray[np.int64], smallest_effect: float
) -> Iterator[MetricResult]:
    """Yield one result per metric that both evaluations have."""
    clusters = a.column("cluster", of_a).astype(np.int64)
    documents = np.arange(len(of_a))
    tokens = [rows.column("supervised_tokens", lines) for rows, lines in ((a, of_a), (b, of_b))]
    # With other tokenizers a loss per token has another unit.
    is_loss_comparable = bool((tokens[0] == tokens[1]).all())
    shared = [_metric(name) for name in a.metrics]
    for metric in [*([LOSS] if is_loss_comparable else []), *(each for each in shared if each.name in b.metrics)]:
        column = f"{TUNED}{metric.name}"
        weights = tokens[0] if metric is LOSS else np.ones(len(documents))
        values = MetricValues(metric, documents, a.column(column, of_a), b.column(column, of_b), weights)
        result = metric_result(values, values.tested(clusters.tolist(), np.ones(len(documents), bool)), smallest_effect)
        if result.num_pairs or metric is LOSS:
            yield result


def _read(files: Sequence[Path]) -> _Rows:
    """Return the rows of files together; clusters of different files are different.

    Raises:
        UserError: A file is missing or damaged.
    """
    tables = [_read_table(file) for file in files]
    first_cluster = 0
    for at, table in enumerate(tables):
        clusters = np.asarray(table["cluster"].to_numpy(), np.int64) + first_cluster
        tables[at] = table.set_column(table.column_names.index("cluster"), "cluster", pa.array(clusters))
        first_cluster = int(clusters.max(initial=first_cluster)) + 1
    joined = pa.concat_tables(tables, promote_options="permissive")
    keys = zip(joined["set"].to_pylist(), _keys(joined), strict=True)
    return _Rows(joined, dict(_numbered(keys)))


def _keys(table: Table) -> list[str | None]:
    """Return the key of each row; None for a row that was not answered."""
    return table["key"].to_pylist() if "key" in table.column_names else [None] * len(table)


def _read_table(file: Path) -> Table:
    """Return the rows of a file.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        table = parquet.read_table(file)
        for name in ("set", "cluster", "supervised_tokens"):
            table[name]
        return table
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
