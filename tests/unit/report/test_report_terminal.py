"""`packhorse check` and `packhorse prepare` in a terminal of 80 columns."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from packhorse.data.audit_report import AuditReport
from packhorse.data.data_manifest import SplitCounts
from packhorse.report.terminal import figure_lines, finding_lines, ledger_table, row_text, split_table
from report_cases import empty_report, hostile_report, real_report


def printed(*parts: RenderableType, colour: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=colour, color_system="standard" if colour else None)
    for part in parts:
        console.print(part)
    return out.getvalue()


def everything(report: AuditReport) -> str:
    rows = [row_text(row, in_colour=False) for row in report.rows]
    return printed(ledger_table(report.ledger), split_table(report.splits), finding_lines(report), *rows)


@pytest.mark.parametrize("make", [real_report, hostile_report, empty_report], ids=["real", "hostile", "empty"])
def test_no_line_is_wider_than_80_columns_and_nothing_steers_the_terminal(make: Callable[[], AuditReport]) -> None:
    shown = everything(make()) + "\n".join(text for _, text in figure_lines(make()))
    assert not {"\x1b", "\x07", "\u202e", "\x00"} & set(shown)
    assert all(cell_len(line.rstrip()) <= 80 for line in everything(make()).split("\n"))


def test_the_ledger_has_what_came_in_and_all_of_where_it_went() -> None:
    lines = [line.split() for line in printed(ledger_table(real_report().ledger)).splitlines()]
    assert lines[1] == ["read", "8,673", "100.00", "%", "1,742,906", "100.00", "%"]
    figures = [(int(line[-6].replace(",", "")), float(line[-5]), int(line[-3].replace(",", ""))) for line in lines[1:]]
    assert sum(rows for rows, _, _ in figures[1:]) == 8_673
    assert sum(tokens for *_, tokens in figures[1:]) == 1_742_906
    assert sum(round(100 * percent) for _, percent, _ in figures[1:]) == 10_000
    assert len(figures) == 8  # what is nothing has no line


def test_findings_stand_under_their_source_with_what_to_do() -> None:
    shown = printed(finding_lines(real_report()))
    gsm8k, tickets = shown.split("data/tickets_es.csv", 1)
    assert " 7  look wrongly decoded (data.fix_encoding: true fixes them)" in gsm8k
    assert "35  are a copy of an earlier row (in total, 40 copies are dropped)" in tickets
    assert "12  hold an email address (masked in the score card, not in packs)" in tickets
    assert "data/gsm8k_train.jsonl:104 and 22 more" in " ".join(shown.split())
    assert "stratum de has 84 rows" in shown
    assert finding_lines(empty_report()).row_count == 0


def test_figures_name_sources_lengths_and_shares() -> None:
    lines = [f"{label}: {text}" for label, text in figure_lines(real_report())]
    at = lines.index("source: data/tickets_es.csv: 1,186 rows, text_label, for train")
    assert lines[at + 1 : at + 4] == [
        "keys used: text (body) 1,186, label 1,186",
        "keys kept: id 1,180",
        "keys ignored: notes 40",
    ]
    assert "tokens per row: median 187, 99 % up to 512, longest 11,592 (T is 2,048)" in lines
    assert "supervised: 57.1% of 1,742,906 tokens" in lines
    assert lines[-1].startswith("shares: train 85 %, validation 15 %: 8,592 rows")


def test_supervised_text_is_green_or_in_brackets() -> None:
    row = real_report().rows[1]
    assert "⟦card_3<|im_end|>⟧" in printed(row_text(row, in_colour=False))
    assert "\x1b[32mcard_3<|im_end|>\x1b[0m" in printed(row_text(row, in_colour=True), colour=True)


def test_a_long_row_shows_its_beginning_and_its_end() -> None:
    shown = printed(row_text(hostile_report().rows[1], in_colour=False))
    assert shown.count("\n") < 40
    assert "characters …›" in shown
    assert shown.rstrip().endswith("<|im_end|>⟧")


def test_prepared_splits_show_supervised_tokens_too() -> None:
    counts = SplitCounts(
        num_rows=7_304, num_tokens=1_454_218, num_supervised_tokens=830_001, num_packs=711, fill=0.9987
    )
    heading, line, *_ = printed(split_table({"train": counts})).splitlines()
    assert heading.split() == ["split", "rows", "tokens", "supervised", "packs", "fill"]
    assert line.split() == ["train", "7,304", "1,454,218", "830,001", "711", "99.87", "%"]
