"""`packhorse runs`: one line per folder, whatever is in it; sweeps together; the end of metrics.jsonl only."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.recipe.sweep import SweepRun
from packhorse.run_folder.metrics import read_last
from packhorse.run_folder.sweep import create_sweep
from packhorse.workflows.runs import list_runs
from run_report_cases import write_finished, write_run


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # workers of xdist have one of their own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten folders: runs in several states, a sweep of two runs of which one is missing, broken and foreign folders."""
    write_finished(tmp_path, "done")
    recipe = write_run(tmp_path, "run-10", "training").recipe
    write_run(tmp_path, "run-9", "stopped")
    create_sweep(
        tmp_path / "s",
        "r.yaml",
        [SweepRun(n, (f"seed={n}",), recipe.model_copy(update={"name": f"s-{n}"})) for n in (1, 2)],
    )
    write_run(tmp_path, "s-1", "finished")
    write_run(tmp_path, "torn")
    (tmp_path / "torn" / "status.json").write_text('{"state": "trai')
    write_run(tmp_path, "old")
    (tmp_path / "old" / "plan.json").write_text('{"version": 99}')
    (tmp_path / "bad-evaluation").mkdir()
    write_finished(tmp_path, "graded")
    (tmp_path / "graded" / "evaluation.json").write_text("[]")
    (tmp_path / "foreign\x1b[31m").mkdir()
    (tmp_path / ".data").mkdir()
    (tmp_path / "notes.txt").write_text("no folder")
    return tmp_path


def test_every_folder_has_its_line(folder: Path) -> None:
    found = {summary.name: summary for summary in list_runs(folder)}
    kinds = {name: summary.kind for name, summary in found.items()}
    assert kinds == {
        "done": "run",
        "run-9": "run",
        "run-10": "run",
        "s-1": "run",
        "s-2": "broken",
        "torn": "broken",
        "old": "broken",
        "graded": "broken",
        "bad-evaluation": "other",
        "foreign\x1b[31m": "other",
    }
    names = list(found)
    assert names.index("run-10") == names.index("run-9") + 1
    assert names.index("s-2") == names.index("s-1") + 1
    assert (found["s-1"].sweep, found["s-1"].overrides) == ("s", ("seed=1",))
    assert found["s-2"].problem == "its folder is missing"
    assert (found["run-9"].state, found["run-10"].state) == ("stopped", "killed")
    assert "its version is 99" in found["old"].problem


def test_figures_of_a_run_are_its_last_ones(folder: Path) -> None:
    (done,) = [summary for summary in list_runs(folder) if summary.name == "done"]
    # 2.5 - 2,000 / 2,000; 65 % and 95 % of 40 rows.
    assert (done.train_loss, done.validation_loss, done.elapsed_seconds) == (2.0, 1.5, 2_000.0)
    assert done.evaluation is not None
    assert done.evaluation.result.difference == pytest.approx(0.30)
    assert (done.evaluation.result.verdict, done.evaluation.decision) == ("better", "NO-GO")


def test_the_table_has_the_verdict_and_no_control_characters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder)]) == 0
    out = capsys.readouterr().out
    (done,) = [line for line in out.splitlines() if line.startswith("done")]
    assert done.split() == (
        [
            "done",
            "finished",
            "2,000/2,000",
            "2",
            "1.5",
            "NO-GO;",
            "exact_match",
            "+30.0",
            "points:",
            "better",
            "33",
            "min",
            "20",
            "s",
        ]
    )
    assert "\x1b[31m" not in out
    assert "foreign‹U+001B›[31m: it contains no plan.json" in out
    assert "s-1 (seed=1)" in out


def test_json_has_every_run_and_no_nan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run-9" / "metrics.jsonl").write_text('{"step": 1, "train/loss": "nan"}\n')
    assert main(["runs", str(folder), "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out, parse_constant=pytest.fail)}
    assert len(found) == 10
    assert found["run-9"]["train_loss"] == "nan"
    assert found["done"]["evaluation"]["decision"] == "NO-GO"


def test_an_empty_and_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "holds no runs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_neither_torch_nor_scipy_is_imported(tmp_path: Path) -> None:
    write_finished(tmp_path)
    code = (
        "import sys; from packhorse.cli.main import main; main(['runs', '.']);"
        "heavy = {'torch', 'transformers', 'scipy', 'pyarrow'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NO-GO" in done.stdout


def test_the_last_values_are_read_from_the_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 5, "a": 1.0, "filler": 0.123456789}) + "\n"
    first, validated = '{"step": 1, "first": 7}\n', '{"step": 2, "b": 2.0}\n'
    # `b` is more than 64 KiB before the end, `first` more than 1 MiB.
    file.write_text(first + line * 30_000 + validated + line * 3_000 + '{"step": 6, "a": "nan"}\n{"step": 7, "a": 9')
    found = read_last(file, ("a", "b", "first"))
    assert math.isnan(found["a"])  # the torn line is skipped
    assert found["b"] == 2.0
    assert "first" not in found
    assert read_last(tmp_path / "absent", ("a",)) == {}
    file.write_bytes(b'\xff\x00{"a": \n"a"\n')
    assert read_last(file, ("a",)) == {}
