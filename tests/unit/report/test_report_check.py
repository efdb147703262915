"""`packhorse check`, with an audit made by hand: what it prints, and the page that it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.report.data_page import render_data_page
from packhorse.workflows import check as data
from report_cases import hostile_report, real_report
from tiny import write_tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_tiny(tmp_path)
    return tmp_path


def test_check_prints_figures_and_says_where_the_page_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "audit", lambda recipe, progress: real_report())
    assert main(["check", "tiny.yaml"]) == 0
    shown = capsys.readouterr().out
    wanted = ["a fresh llama", "7,473 rows, question_answer", "84.22 %", "35  are a copy", "⟦card_3<|im_end|>⟧"]
    assert [text for text in wanted if text not in shown] == []
    assert "runs/.check/tiny/data.html" in shown
    assert shown.endswith("Next: packhorse train tiny.yaml\n")
    page = folder / "runs" / ".check" / "tiny" / "data.html"
    assert page.read_text(encoding="utf-8") == render_data_page(real_report())


def test_the_page_lies_where_the_runs_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(folder / "elsewhere"))
    monkeypatch.setattr(data, "audit", lambda recipe, progress: hostile_report())
    assert main(["check", "tiny.yaml", "runs_folder=${env:PLACE}"]) == 0
    assert [path.name for path in (folder / "elsewhere" / ".check" / "tiny").iterdir()] == ["data.html"]
