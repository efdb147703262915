"""report.html as a real browser shows it: narrow, wide, light, dark, with texts that would break a careless page."""

from __future__ import annotations

from typing import Any

import pytest
from looking import assert_contained, assert_readable, look

from packhorse.report.run_page import render_run_page
from packhorse.report.run_report import read_report
from run_report_cases import write_finished, write_run

WIDTHS = (360, 1000)
ANY = pytest.mark.parametrize("name", [f"{page} {width}" for page in ("real", "hostile", "new") for width in WIDTHS])


@pytest.fixture(scope="module")
def seen(browser: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the probe found, by colour scheme, then by page and width; every `details` is open."""
    folder = tmp_path_factory.mktemp("runs")
    plans = {
        "real": write_finished(folder, "real"),
        "hostile": write_finished(folder, "hostile", hostile=True),
        "new": write_run(folder, "new"),
    }
    pages = {name: render_run_page(read_report(plan), f"runs/{name}") for name, plan in plans.items()}
    schemes = (("light", False), ("dark", True))
    return {name: look(browser, tmp_path_factory.mktemp(name), pages, WIDTHS, dark) for name, dark in schemes}


@ANY
def test_the_page_is_never_wider_than_the_screen_and_runs_nothing(seen: dict[str, Any], name: str) -> None:
    assert_contained(seen["light"][name], int(name.split()[1]))
    assert seen["light"][name]["title"] == f"Report of {name.split(maxsplit=1)[0]}"


@ANY
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_background(seen: dict[str, Any], name: str, scheme: str) -> None:
    assert_readable(seen[scheme][name], scheme)


def test_verdicts_are_words_and_not_only_colours(seen: dict[str, Any]) -> None:
    for name in ("real 360", "real 1000"):
        body = " ".join(seen["light"][name]["body"].split())
        assert "The tuned model is better than its base" in body
        assert "+30.0 points" in body
        assert "worse" in body
