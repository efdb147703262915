"""Cross-validation through the command line: two real runs, evaluated as one."""

from __future__ import annotations

import json
from pathlib import Path

from pyarrow import parquet

from cli import packhorse
from tiny import write_tiny


def test_folds_are_trained_evaluated_once_per_row_and_listed(tmp_path: Path) -> None:
    write_tiny(tmp_path, steps=2, sweep={"folds": 2})
    done = packhorse(tmp_path, "train", "tiny.yaml")
    assert done.code == 0, done.err
    assert "done: runs/tiny; next: packhorse evaluate runs/tiny" in done.out
    again = packhorse(tmp_path, "train", "tiny.yaml")
    assert again.code == 0, again.err
    assert "running" not in again.out
    evaluated = packhorse(tmp_path, "evaluate", "runs/tiny")
    assert evaluated.code == 0, evaluated.err
    runs = [tmp_path / "runs" / f"tiny-fold-{n}" for n in (1, 2)]
    manifests = [json.loads((run / "data.json").read_text()) for run in runs]
    rows = [parquet.read_table(run / "evaluation" / "rows.parquet") for run in runs]
    # The rows that each fold held out are all rows of the source, each once.
    assert sum(len(table) for table in rows) == manifests[0]["sources"][0]["rows"]
    assert not set(rows[0]["key"].drop_null().to_pylist()) & set(rows[1]["key"].drop_null().to_pylist())
    (line,) = json.loads((tmp_path / "runs" / "tiny" / "sweep-evaluation.json").read_text())["lines"]
    assert line["runs"] == ["tiny-fold-1", "tiny-fold-2"]
    assert line["result"]["num_pairs"] == 16  # max_answered_rows is 8
    listed = packhorse(tmp_path, "runs")
    assert "sweep tiny" in listed.out
