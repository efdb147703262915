"""An evaluation as its files hold it: the answers of each row, and a place for opinions on them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ArrowException, parquet

from packhorse.errors import UserError
from packhorse.evaluate.metrics.metric import Metric, without_thinking
from packhorse.evaluate.results import Comparison, ComparisonLine
from packhorse.evaluate.verdict import MetricValues, adjusted, gate_results, metric_result
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.run_folder.folder import relative

Opinions = Mapping[int, tuple[float, float]]
"""Values of base and tuned model by line of the table; a line without an entry has no opinion, NaN is no value."""


@dataclass(frozen=True)
class AnsweredRow:
    """A row with the answers of both models, without thinking.

    Attributes:
        line: Line in the table of rows.
        set: Name of the set.
        key: Hash of the content, with the number of earlier rows of equal content.
        messages: Turns before the answer.
        expected: Expected answer.
        base: Answer of the base.
        tuned: Answer of the tuned model.
    """

    line: int
    set: str
    key: str
    messages: tuple[dict[str, Any], ...]
    expected: str
    base: str
    tuned: str

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Return role and text of each turn before the answer; calls of tools as JSON."""
        return [(str(message["role"]), _text(message)) for message in self.messages]

    @property
    def conversation(self) -> str:
        """Return the turns as one text."""
        return "\n\n".join(f"[{role}]\n{text}" for role, text in self.turns)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the row and both answers: an opinion on other answers does not count for these."""
        return hashlib.sha256(json.dumps([self.set, self.key, self.base, self.tuned]).encode()).hexdigest()[:32]


def _text(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    parts = (message.get("content"), json.dumps(calls, ensure_ascii=False) if calls else None)
    return "\n".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class StoredEvaluation:
    """Result of an evaluation and its table of rows."""

    comparison: Comparison
    table: pa.Table

    def rows(self) -> list[AnsweredRow]:
        """Return the answered rows, ordered by a hash of their content."""
        names = ("set", "key", "messages", "expected", "base/answer", "tuned/answer")
        if "key" not in self.table.column_names:  # no row was answered
            return []
        seen: Counter[tuple[str, str]] = Counter()
        found = []
        for line, row in enumerate(self.table.select(names).to_pylist()):
            if row["messages"] is None:  # not answered
                continue
            number = seen[row["set"], row["key"]]
            seen[row["set"], row["key"]] += 1
            texts = [without_thinking(str(row[name])).strip() for name in names[3:]]
            key = f"{row['key']}-{number}" if number else row["key"]
            found.append(AnsweredRow(line, row["set"], key, tuple(json.loads(row["messages"])), *texts))
        return sorted(found, key=lambda row: row.key)

    def without(self, *metrics: Metric) -> StoredEvaluation:
        """Return the evaluation without some metrics; `with_opinions` adjusts p of the others."""
        names = {metric.name for metric in metrics}
        kept = [
            line.model_copy(update={"metrics": tuple(r for r in line.metrics if r.metric not in names)})
            for line in self.comparison.lines
        ]
        comparison = self.comparison.model_copy(update={"lines": tuple(kept)})
        columns = [column for column in self.table.column_names if column.partition("/")[2] in names]
        return StoredEvaluation(comparison, self.table.drop_columns(columns))

    def with_opinions(self, metric: Metric, opinions: Opinions, settings: EvaluationSection) -> StoredEvaluation:
        """Return the evaluation with one more metric, p adjusted for the larger number, and the gate decided again.

        Args:
            metric: Name, kind and unit of the values.
            opinions: Values by line of the table.
            settings: Section of the recipe.
        """
        sets = np.array(self.table["set"].to_pylist(), dtype=object)
        lines = adjusted([self._line(line, sets, metric, opinions, settings) for line in self.comparison.lines])
        update = {"lines": lines, "gate": gate_results(lines, settings)}
        table = self.table
        for side, name in enumerate(("base", "tuned")):
            values = [opinions[line][side] if line in opinions else None for line in range(len(table))]
            table = table.append_column(f"{name}/{metric.name}", pa.array(values, pa.float64()))
        return StoredEvaluation(self.comparison.model_copy(update=update), table)

    def _line(
        self,
        line: ComparisonLine,
        sets: NDArray[np.object_],
        metric: Metric,
        opinions: Opinions,
        settings: EvaluationSection,
    ) -> ComparisonLine:
        """Return the line of a whole set with the metric; groups have the headline only."""
        of_set = np.flatnonzero(sets == line.set)
        given = [at for at in of_set if int(at) in opinions]
        if line.group is not None or not given:
            return line
        base, tuned = np.array([opinions[int(at)] for at in given], np.float64).T
        # `documents` and `clusters` are by document of the set, whose lines follow each other.
        documents = np.searchsorted(of_set, given).astype(np.int64)
        clusters = np.asarray(self.table["cluster"].to_numpy(), np.int64)[of_set]
        values = MetricValues(metric, documents, base, tuned, np.ones(len(given)))
        tested = values.tested(clusters.tolist(), np.ones(len(of_set), bool))
        result = metric_result(values, tested, settings.smallest_effect)
        return line.model_copy(update={"metrics": (*line.metrics, result)})

    def with_notes(self, **notes: Any) -> StoredEvaluation:  # noqa: ANN401
        """Return the evaluation with other fields of the comparison, such as `judge`."""
        return replace(self, comparison=self.comparison.model_copy(update=notes))


def require_writable(file: Path) -> None:
    """Raise before an opinion is given, or paid for, that could not be kept.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise UserError(
            f"{relative(file)} cannot be written: {error.strerror}.",
            "opinions are kept there as they arrive.",
            "free space there, or fix the permissions of that folder.",
        ) from error


def read_stored(result: Path, rows: Path, run: str, flags: Sequence[str] = ()) -> StoredEvaluation:
    """Return an evaluation from its files.

    Args:
        result: evaluation.json of a run.
        rows: rows.parquet beside it.
        run: The run as the user would type it.
        flags: Flags of `packhorse evaluate` that make these files.

    Raises:
        UserError: There is no evaluation yet, a file is damaged, or no row was answered.
    """
    command = " ".join(["packhorse evaluate", run, *flags])
    name = result
    try:
        comparison = Comparison.model_validate_json(result.read_text(encoding="utf-8"))
        name = rows
        stored = StoredEvaluation(comparison, parquet.read_table(rows))
        num_answered = len(stored.rows())
    except (OSError, ValueError, KeyError, ArrowException) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist" if missing else f"cannot be read: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{relative(name)} {reason}.",
            "opinions are given on the answers of an evaluation, which it holds.",
            f"evaluate the run first: {command}",
        ) from error
    if not num_answered:
        raise UserError(
            f"no row of {relative(rows)} was answered.",
            "opinions are given on answers, and evaluation.max_answered_rows is 0, or no row is a chat.",
            "train with evaluation.max_answered_rows above 0 and rows that are chats.",
        )
    return stored
