"""report.html and report.json: figures against values computed by hand, escaping, what is missing or damaged."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import pytest
from test_report_page import Document

from packhorse.cli.main import main
from packhorse.report.curves import Curve, plot_of, series_of, thinned
from packhorse.report.effects import set_views
from packhorse.report.run_page import render_run_page
from packhorse.report.run_report import read_report
from packhorse.run_folder.folder import open_run
from report_cases import HOSTILE
from run_report_cases import (
    EXACT,
    LOSS,
    NAN_STEP,
    SPIKE_STEP,
    comparison,
    line_of,
    write_finished,
    write_rows,
    write_run,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a finished run."""
    plan = write_finished(tmp_path_factory.mktemp("runs"))
    return render_run_page(read_report(plan), "runs/r")


def words_of(page: str) -> str:
    body = page.partition("<body>")[2]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


def test_the_verdict_is_one_sentence_with_what_it_rests_on(page: str) -> None:
    # 26 and 38 of 40 rows; exact McNemar of 14 against 2: 2 * (1 + 16 + 120) / 2**16 = 0.0042, times 1 of 3 by Holm:
    # the two losses have smaller p, and the retain answers do not differ.
    (sentence,) = [given for tag, given in Document(page).tags if given.get("class") == "verdict worse"]  # NO-GO
    assert sentence["id"] == "verdict"
    words = words_of(page)
    assert "The tuned model is better than its base: exact_match is 95.0 %, against 65.0 %: +30.0 points" in words
    assert "It rests on 40 rows of validation: exact McNemar, p = 0.0042 adjusted for" in words
    assert "Old skills are worse: loss on retain rows changes by +0.4" in words
    assert "NO-GO: retain loss, drop below 0.050: not met." in words


@pytest.mark.parametrize(
    "figures",
    [
        ["2,000 tokens per second", "25.0 % of the GPU", "the plan expected 0.5 s"],
        ["3.00 GiB", "the plan expected 4.00 of 8 GiB"],
        [
            "tuned better on 30, base on 4, tie on 5 of 40 rows",
            "35 of 39 rows",
            "71 % of 70 verdicts",
            "a position bias",
        ],
        ["People, choices: 9 rows (by rater: What is 2 + 2? 9)", "62 % of 8 preferences"],
        ["waiting for data 10.0 %", "compute 80.0 %", "evaluation and checkpoints 10.0 %"],
        ["200 of 2,200 steps (9.1 %) were lost or repeated", "1,000 to 2,000", "16 min 40 s", "killed"],
        ["dropped: duplicate of a row that is kept", "10 10.00 % 100 10.00 %", "100 100.00 % 1,000 100.00 %"],
        ["better on 14 and worse on 2", "The test set was opened once", "accuracy 87.5 %", "0123456789abcdef"],
        ["train: last 2, lowest 2", "validation: last 1.5", "NaN or Inf at 1 step (dotted)", "last 3"],
    ],
    ids=["speed", "memory", "judge", "people", "time", "attempts", "ledger", "rows", "curves"],
)
def test_figures_are_those_of_the_run(page: str, figures: list[str]) -> None:
    words = words_of(page)
    assert [figure for figure in figures if figure not in words] == []


def test_a_spike_stays_and_nan_is_marked() -> None:
    points = [(float(step), 50.0 if step == SPIKE_STEP else 2.0) for step in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 600
    assert (float(SPIKE_STEP), 50.0) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)
    series = series_of("loss", [(1.0, math.nan), (2.0, 1.0), (3.0, math.inf)])
    assert series is not None
    assert (series.num_points, series.num_not_finite, series.not_finite) == (1, 2, (1.0, 3.0))


@pytest.mark.parametrize(
    ("title", "lowest", "is_log"),
    [("Loss", 0.02, True), ("Loss", 0.03, False), ("Loss", -1.0, False), ("Learning rate", 0.02, False)],
)
def test_only_a_loss_or_norm_of_wide_range_has_a_logarithmic_scale(title: str, lowest: float, is_log: bool) -> None:
    series = series_of("x", [(1.0, 2.0), (2.0, lowest)])
    assert series is not None
    plot = plot_of(Curve(title=title, unit="", is_log_if_wide=title == "Loss", series=(series,)))
    assert plot.is_log is is_log


def test_nan_is_drawn_at_its_step(tmp_path: Path) -> None:
    loss, _ = plot_of(read_report(write_finished(tmp_path)).curves[0]).lines
    # Steps 1 to 2,000 are 0 to 1,000 wide.
    assert loss.marks == (pytest.approx(1_000 * (NAN_STEP - 1) / 1_999, abs=0.06),)


def test_whiskers_are_on_one_scale_and_better_is_right() -> None:
    (view,) = set_views(comparison(["a", "b"]).lines[:1])
    loss, exact = view.rows
    for row in (loss, exact):
        assert row.zero < row.low < row.at < row.high
    # Points: zero is at 6 % of the width, the upper end of the interval at 94 %.
    assert exact.zero == pytest.approx(6)
    assert exact.high == pytest.approx(94)
    assert "+30.0 points" in exact.label


def test_a_metric_without_values_has_no_whisker() -> None:
    (view,) = set_views([line_of((LOSS, [math.nan], [math.nan]), (EXACT, [], []), (LOSS, [2.0], [1.0]))])
    assert [(row.at, row.low, row.verdict) for row in view.rows] == [
        (None, None, "not finite"),
        (94.0, None, "too few"),  # one row has no interval
    ]


def test_hostile_text_is_text(tmp_path: Path) -> None:
    plan = write_finished(tmp_path, hostile=True)
    document = Document(render_run_page(read_report(plan), "runs/r"))
    assert {tag for tag, _ in document.tags}.isdisjoint({"script", "img", "link", "iframe", "form", "base"})
    assert not [name for _, given in document.tags for name in given if name.startswith("on")]
    shown = "".join(document.text["body"])
    for text in HOSTILE[:5]:
        assert shown.count(text) >= 6
    assert "‹U+202E›" in shown
    assert document.text["title"][0] == "Report of r"
    ids = [given["id"] for _, given in document.tags if "id" in given]
    links = [given["href"].removeprefix("#") for _, given in document.tags if "href" in given]
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)


def test_a_run_without_evaluation_names_the_command(tmp_path: Path) -> None:
    finished = render_run_page(read_report(write_run(tmp_path, "one", "finished")), "runs/one")
    assert "This run is not evaluated yet." in finished
    assert ">packhorse evaluate runs/one<" in finished
    stopped = render_run_page(read_report(write_run(tmp_path, "two", "stopped")), "runs/two")
    assert "it has not finished (stopped, step 0 of 2,000)" in stopped
    assert ">packhorse resume runs/two<" in stopped
    assert "No step was logged." in stopped


def test_damaged_files_are_notes_and_the_rest_is_shown(tmp_path: Path) -> None:
    plan = write_finished(tmp_path)
    run = Path(plan.run_folder)
    (run / "evaluation.json").write_text("{")
    (run / "evaluation" / "rows.parquet").write_bytes(b"no parquet")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2001, "train/loss": [1], "speed/mfu": null}\n\xff\xfe{"step"\n"5"\n{"step": "nan"}\n')
    report = read_report(plan)
    assert [note.partition(" ")[0] for note in report.notes] == ["3", "evaluation.json"]
    words = words_of(render_run_page(report, "runs/r"))
    assert "This run is not evaluated yet." in words
    assert "2,000 tokens per second" in words


def test_the_page_of_10_000_rows_is_small(tmp_path: Path) -> None:
    plan = write_finished(tmp_path)
    write_rows(Path(plan.run_folder), [text * 50 for text in HOSTILE], 10_000)
    assert main(["report", plan.run_folder]) == 0
    page, figures = (Path(plan.run_folder) / name for name in ("report.html", "report.json"))
    assert page.stat().st_size < 2_000_000
    assert figures.stat().st_size < 2_000_000
    read = json.loads(figures.read_text(encoding="utf-8"))
    assert (read["changes"]["num_wins"], read["changes"]["num_losses"]) == (3_500, 500)
    assert len(read["changes"]["wins"]) == len(read["changes"]["losses"]) == 20
    assert read["curves"][0]["series"][0]["num_not_finite"] == 1


def test_the_command_prints_the_verdict_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_finished(tmp_path)
    assert main(["report", plan.run_folder]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The tuned model is better than its base: exact_match is 95.0 %, against 65.0 %")
    assert "report.html" in out
    assert open_run(plan.run_folder).run_folder == plan.run_folder
