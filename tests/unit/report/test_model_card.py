"""The README.md of an exported model: the verdict and where it comes from, and no text of any row."""

from __future__ import annotations

from pathlib import Path

import yaml

from packhorse.report.model_card import model_card
from packhorse.report.run_report import read_report
from run_report_cases import write_finished


def test_the_card_says_what_the_model_is_worth_and_shows_no_row(tmp_path: Path) -> None:
    plan = write_finished(tmp_path / "runs", hostile=True)
    report = read_report(plan)
    card = model_card(plan, report)
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "model is better" in body or "no difference" in body or "too few rows" in body
    assert report.evaluation is not None
    for line in report.evaluation.lines:
        for result in line.metrics if line.group is None else ():
            assert f"| {line.set} | {result.metric} |" in body
    assert "train: trained on" in body
    assert report.hashes["plan.json"] in body
    assert "<script" not in card, "rows and names of this run hold scripts"
    assert "\n\n\n" not in card


def test_a_run_that_is_not_evaluated_says_so(tmp_path: Path) -> None:
    plan = write_finished(tmp_path / "runs")
    (Path(plan.run_folder) / "evaluation.json").unlink()
    card = model_card(plan, read_report(plan))
    assert "This run is not evaluated yet" in card
    assert "## Evaluation" not in card
