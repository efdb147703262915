"""Evaluation of a sweep: order, pooled folds and paired tests, against scipy and values computed by hand."""

from __future__ import annotations

import statistics
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.stats import binomtest

from packhorse.cli.main import main
from packhorse.evaluate.shared_rows import base_against_tuned
from packhorse.evaluate.sweep_results import read_sweep_evaluation
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import expand
from packhorse.run_folder.status import Status, write_status
from packhorse.run_folder.sweep import create_sweep
from run_report_cases import write_finished
from tiny import write_tiny


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.chdir(tmp_path)


def write_sweep(folder: Path, sweep: str) -> list[str]:
    """A sweep `s` whose runs are finished and evaluated; return their names."""
    runs = expand(load_recipe(str(write_tiny(folder)), [f"sweep={sweep}", "name=s"]))
    create_sweep(folder / "s", "tiny.yaml", runs)
    for run in runs:
        write_finished(folder, run.recipe.name)
    return [run.recipe.name for run in runs]


def write_answers(file: Path, base: list[int], tuned: list[int], first: int = 0) -> Path:
    """Rows with the keys k0, k1 …, two supervised tokens each, every row a cluster alone."""
    count = len(base)
    columns = {
        "set": ["validation"] * count,
        "key": [f"k{first + at}" for at in range(count)],
        "cluster": list(range(count)),
        "supervised_tokens": [2] * count,
        "base/loss": [2.0] * count,
        "tuned/loss": [1.0] * count,
        "base/exact_match": list(map(float, base)),
        "tuned/exact_match": list(map(float, tuned)),
        "base/answer": ["x"] * count,
        "tuned/answer": ["x"] * count,
        "base/ended": [True] * count,
        "tuned/ended": [True] * count,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file)
    return file


def rows_of(name: str) -> Path:
    return Path(name) / "evaluation" / "rows.parquet"


def test_runs_are_ranked_and_tested_against_the_best_with_holm_over_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_sweep(tmp_path, "{grid: {seed: [1, 2, 3]}}")
    base = [0] * 40
    # Right answers: 10, 34 and 30 of 40; those of the third are among those of the second.
    for name, right in zip(names, (10, 34, 30)):
        write_answers(rows_of(name), base, [1] * right + [0] * (40 - right))
    assert main(["evaluate", "s"]) == 0
    found = read_sweep_evaluation(tmp_path / "s")
    assert found is not None
    assert [line.runs for line in found.lines] == [("s-2",), ("s-3",), ("s-1",)]
    assert [line.result.tuned for line in found.lines] == [0.85, 0.75, 0.25]
    # Discordant pairs: 34, 30 and 10 against the base; 4 and 24 against the best.
    raw = [binomtest(0, n).pvalue for n in (34, 30, 10, 24)]
    steps = sorted(raw)
    holm = {p: max((4 - at) * steps[at] for at in range(steps.index(p) + 1)) for p in raw}
    assert [line.result.p_adjusted for line in found.lines] == pytest.approx([holm[p] for p in raw[:3]])
    third, first = found.lines[1].against_best, found.lines[2].against_best
    assert (third.verdict, first.verdict) == ("too few", "worse")
    assert first.p_adjusted == pytest.approx(holm[raw[3]])
    out = capsys.readouterr().out
    assert "exact_match on validation rows; best first" in out
    assert main(["runs", "."]) == 0
    assert "best: s-2 (seed=2); exact_match 0.0 % → 85.0 %" in capsys.readouterr().out


def test_folds_are_pooled_with_each_row_once_and_their_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_sweep(tmp_path, "{folds: 3}")
    rights, sizes = (9, 8, 4), (10, 10, 8)
    for at, (name, right, size) in enumerate(zip(names, rights, sizes)):
        write_answers(rows_of(name), [1] + [0] * (size - 1), [1] * right + [0] * (size - right), first=10 * at)
    assert main(["evaluate", "s"]) == 0
    found = read_sweep_evaluation(tmp_path / "s")
    assert found is not None
    (line,) = found.lines
    assert line.runs == ("s-fold-1", "s-fold-2", "s-fold-3")
    assert line.result.num_pairs == line.result.num_clusters == 28
    assert (line.result.base, line.result.tuned) == pytest.approx((3 / 28, 21 / 28))
    # 18 rows only the tuned models answer right, none only the base.
    assert line.result.p == pytest.approx(binomtest(0, 18).pvalue)
    shares = [0.9, 0.8, 0.5]
    assert line.fold_mean == pytest.approx(statistics.mean(shares))
    assert line.fold_deviation == pytest.approx(statistics.stdev(shares))
    assert "73.3 % ± 20.8 %" in capsys.readouterr().out


def test_a_pooled_loss_is_weighted_by_tokens_and_clusters_of_two_folds_are_different(tmp_path: Path) -> None:
    files = [write_answers(tmp_path / f"{at}.parquet", [0] * 6, [1] * 6, first=10 * at) for at in (0, 1)]
    table = parquet.read_table(files[1])
    heavy = table.set_column(table.column_names.index("supervised_tokens"), "supervised_tokens", pa.array([6] * 6))
    heavy = heavy.set_column(heavy.column_names.index("tuned/loss"), "tuned/loss", pa.array([0.5] * 6))
    parquet.write_table(heavy, files[1])
    loss = base_against_tuned(files, "validation", 0.03)[0]
    assert (loss.metric, loss.num_clusters) == ("loss", 12)
    assert loss.tuned == pytest.approx((6 * 2 * 1.0 + 6 * 6 * 0.5) / (6 * 2 + 6 * 6))


def test_runs_that_are_not_finished_are_named_and_test_rows_are_not_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_sweep(tmp_path, "{grid: {seed: [1, 2]}, folds: 2}")
    write_status(tmp_path / names[1], Status(state="stopped", step=3, num_steps=6, attempt=1))
    assert main(["evaluate", "s", "--test"]) == 2
    assert "--test is given with the sweep s." in capsys.readouterr().err
    for name in names:
        write_answers(rows_of(name), [0] * 12, [1] * 12, first=20 * (int(name[-1]) % 2))
    assert main(["evaluate", "s"]) == 0
    out = capsys.readouterr().out
    assert "s-3 to s-4 (seed=2)" in out
    assert "s-2 is not in the table: stopped at step 3 of 6" in out
    assert "s-1 is not in the table: its folds are pooled, and s-2 is missing" in out
    for name in names:
        (tmp_path / name / "status.json").unlink()
    assert main(["evaluate", "s"]) == 2
    assert "no run of s can be compared; s-1: not started." in capsys.readouterr().err
