"""data.html as a document: well formed, escaped, self-contained, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from packhorse import durable
from packhorse.data.audit_report import AuditReport
from packhorse.errors import UserError
from packhorse.report.data_page import render_data_page, write_data_page
from report_cases import HOSTILE, empty_report, hostile_report, real_report

VOID = {"meta", "br", "link", "img", "input", "hr"}
REPORTS = pytest.mark.parametrize(
    "report", [real_report, hostile_report, empty_report], ids=["real", "hostile", "empty"]
)
Make = Callable[[], AuditReport]


class Document(HTMLParser):
    """Tags with their attributes, text of each, and whether every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data


@REPORTS
def test_the_page_is_well_formed_and_asks_nobody_for_anything(report: Make) -> None:
    document = Document(render_data_page(report()))
    names = {tag for tag, _ in document.tags}
    assert names.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "form", "base"})
    ids = [given["id"] for _, given in document.tags if "id" in given]
    assert len(ids) == len(set(ids))
    for _, given in document.tags:
        assert not [name for name in given if name.startswith("on") or name in ("src", "srcset", "action")]
        if "href" in given:
            assert given["href"].removeprefix("#") in ids
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((given.get(name) or "").split()) <= set(ids)
    (style,) = document.text["style"]
    assert "@import" not in style
    assert style.count("url(") == style.count("url(#")


@REPORTS
def test_headings_are_in_order_and_tables_and_drawings_are_named(report: Make) -> None:
    document = Document(render_data_page(report()))
    levels = [int(tag[1]) for tag, _ in document.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels))
    names = [tag for tag, _ in document.tags]
    assert names.count("table") == names.count("caption")
    for svg in [at for at, name in enumerate(names) if name == "svg"]:
        assert names[svg + 1 : svg + 3] == ["title", "desc"]
    assert document.tags[0][1] == {"lang": "en"}


def test_hostile_text_stands_there_as_text() -> None:
    document = Document(render_data_page(hostile_report()))
    shown = "".join(document.text["body"])
    for text in HOSTILE[:5]:
        assert shown.count(text) >= 8
    assert "‹U+202E›كتب" in shown
    assert "‹U+0000› escape ‹U+001B›[31mred" in shown
    assert "‹U+D83D›" in shown
    assert document.text["title"][0] == "Data of hostile"
    assert "{{ 7 * 7 }}" in shown
    assert "root:" not in shown


def test_a_long_row_does_not_make_an_endless_page() -> None:
    page = render_data_page(hostile_report())
    assert "‹… 22,010 characters …›" in page
    assert len(page) < 300_000


@pytest.mark.parametrize(
    ("report", "figures"),
    [
        (
            real_report,
            ["8,673", "1,742,906", "84.22 %", "7,304", "57.1 %", "11,592", "‹email›", "JosÃ© bought", "2,048"],
        ),
        (real_report, ["Shares: train 85 %, validation 15 %.", "+1.9", "11 rows, equal", "and 3 more", "12 more"]),
        (hostile_report, ["999,999,000", "123,456,789,012", "&lt;0.01 %", "65 more", "and 999,992 more"]),
        (empty_report, ["There is no row to show.", "No row has a length.", "No two rows are equal or nearly equal."]),
    ],
    ids=["figures", "split and groups", "large figures", "nothing"],
)
def test_what_was_found_is_on_the_page(report: Make, figures: list[str]) -> None:
    page = render_data_page(report())
    assert [figure for figure in figures if figure not in page] == []


def test_only_supervised_text_is_marked() -> None:
    document = Document(render_data_page(real_report()))
    assert document.text["mark"] == [
        "Green and underlined",
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72<|im_end|>",
        "card_3<|im_end|>",
    ]


def test_the_bars_are_as_wide_as_the_ledger_says() -> None:
    document = Document(render_data_page(real_report()))
    grown = [given["style"] for tag, given in document.tags if tag == "i" and "flex-grow" in (given["style"] or "")]
    assert grown == [
        *(f"flex-grow:{rows}" for rows in (14, 40, 25, 2, 7_304, 1_288)),
        *(f"flex-grow:{tokens}" for tokens in (9_310, 2_204, 12_043, 7_000, 1_454_218, 258_131)),
    ]


def test_the_page_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "data.html"
    write_data_page(empty_report(), path)
    before = path.read_text(encoding="utf-8")
    assert before == render_data_page(empty_report())
    assert [entry.name for entry in path.parent.iterdir()] == ["data.html"]

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync_to_disk", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_data_page(real_report(), path)
    assert path.read_text(encoding="utf-8") == before
    assert [entry.name for entry in path.parent.iterdir()] == ["data.html"]


def test_a_folder_that_cannot_be_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="runs_folder"):
        write_data_page(empty_report(), tmp_path / "runs" / "data.html")
