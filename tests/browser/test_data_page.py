"""data.html as a real browser shows it: narrow and wide, light and dark, with rows that would break a careless page."""

from __future__ import annotations

from typing import Any

import pytest
from looking import look

from packhorse.report.data_page import render_data_page
from report_cases import HOSTILE, empty_report, hostile_report, real_report

WIDTHS = (360, 1280)
ANY = pytest.mark.parametrize("name", ["real 360", "real 1280", "hostile 360", "hostile 1280"])
BOTH = pytest.mark.parametrize("scheme", ["light", "dark"])
CLEAR = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def seen(browser: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the probe found, by colour scheme, then by page and width; every `details` is open."""
    pages = {"real": render_data_page(real_report()), "hostile": render_data_page(hostile_report())}
    light = look(browser, tmp_path_factory.mktemp("light"), pages, WIDTHS, dark=False)
    dark = look(browser, tmp_path_factory.mktemp("dark"), pages, WIDTHS, dark=True)
    return {"light": light, "dark": dark}


@ANY
def test_the_page_is_never_wider_than_the_screen(seen: dict[str, Any], name: str) -> None:
    found = seen["light"][name]
    assert found["width"] == int(name.split()[1])
    assert found["overflow"] == 0


@ANY
def test_no_text_of_a_row_runs_or_asks_for_anything(seen: dict[str, Any], name: str) -> None:
    found = seen["light"][name]
    assert found["pwned"] == "no"
    assert found["title"] == f"Data of {name.split(maxsplit=1)[0].replace('real', 'gsm8k-and-tickets')}"
    assert found["scripts"] == 1  # the probe
    assert found["requests"] == []


@ANY
@BOTH
def test_all_text_stands_out_from_its_background(seen: dict[str, Any], name: str, scheme: str) -> None:
    found = seen[scheme][name]
    assert found["dark"] is (scheme == "dark")
    assert found["num_texts"] > 100
    ratio, text = found["lowest"]
    assert ratio >= 4.5, text
    assert found["smallest"] >= 12


@BOTH
def test_trained_text_is_marked_by_more_than_colour(seen: dict[str, Any], scheme: str) -> None:
    found = seen[scheme]["real 360"]
    legend, *marks = found["marks"]
    assert legend["text"] == "Green and underlined"
    assert marks[1]["text"] == "card_3<|im_end|>"
    for mark in found["marks"]:
        assert mark["line"] == "underline"
        assert float(mark["thickness"].removesuffix("px")) >= 2
        red, green, blue = (int(part) for part in mark["backgroundColor"][4:-1].split(", "))
        assert green > max(red, blue)
    assert len(found["unmarked"]) == 4
    for rest in found["unmarked"]:
        assert (rest["line"], rest["backgroundColor"]) == ("none", CLEAR)


def test_the_ledger_is_there_to_the_row(seen: dict[str, Any]) -> None:
    for name in ("real 360", "real 1280"):
        table = " ".join(seen["light"][name]["ledger"].split())
        assert "could not be read or rendered 14 0.16 % 0 0.00 %" in table
        assert "train: trained on 7,304 84.22 % 1,454,218 83.44 %" in table
        assert "Read from all sources 8,673 100.00 % 1,742,906 100.00 %" in table


def test_every_key_is_listed_with_what_happens_to_it(seen: dict[str, Any]) -> None:
    for name in ("real 360", "real 1280"):
        body = " ".join(seen["light"][name]["body"].split())
        assert "data/tickets_es.csv, read as text_label" in body
        assert "text (body) used 1,186 label used 1,186 id kept 1,180 notes ignored 40" in body


def test_the_parts_of_a_bar_fill_it_in_proportion_and_none_is_lost(seen: dict[str, Any]) -> None:
    found = seen["light"]["real 1280"]
    for parts, width in zip(found["segments"], found["bars"]):
        assert sum(parts) + len(parts) - 1 == pytest.approx(width, abs=len(parts))
        assert min(parts) >= 2
        assert parts[-2] / parts[-1] == pytest.approx(7_304 / 1_288, rel=0.03)


def test_t_is_drawn_where_it_falls_and_bars_have_height(seen: dict[str, Any]) -> None:
    for name in ("real 360", "real 1280"):
        found = seen["light"][name]
        # 2,048 is the upper bound of the 15th of 20 bins.
        assert found["limit"] == pytest.approx(15 / 20, abs=0.005)
        assert max(found["rects"]) == pytest.approx(180, abs=1)
        assert min(found["rects"]) >= 2
    assert seen["light"]["hostile 360"]["limit"] is None
    assert "T 131,072, beyond all rows" in seen["light"]["hostile 360"]["body"]


def test_hostile_text_is_read_as_it_stands_in_the_rows(seen: dict[str, Any]) -> None:
    body = seen["light"]["hostile 1280"]["body"]
    for text in HOSTILE[:5]:
        assert body.count(text) >= 8
    assert "‹U+202E›" in body


def test_nothing_found_is_a_page_too(browser: str, tmp_path: Any) -> None:
    (found,) = look(browser, tmp_path, {"empty": render_data_page(empty_report())}, [360], dark=False).values()
    assert found["overflow"] == 0
    assert "No two rows are equal or nearly equal." in found["body"]
