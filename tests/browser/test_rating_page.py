"""The page for blind ratings as a real browser shows it: narrow, wide, light, dark, with hostile answers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from looking import look

from packhorse.evaluate.ratings import Kind, RatingSession
from packhorse.evaluate.stored import AnsweredRow
from packhorse.report.rating_page import RatingServer, render_rating_page
from report_cases import HOSTILE

WIDTHS = (360, 1000)
PAGES = ("choice", "scores", "done")
ANY = pytest.mark.parametrize("name", [f"{page} {width}" for page in PAGES for width in WIDTHS])


def session_of(folder: Path, kind: Kind, num_rows: int = 3) -> RatingSession:
    texts = [text.encode(errors="replace").decode() for text in HOSTILE]
    messages = ({"role": "system", "content": texts[0]}, {"role": "user", "content": "\n".join(texts)})
    rows = [
        AnsweredRow(row, "validation", f"{row}", messages, texts[1], "Short.", "\n".join(texts) * 5)
        for row in range(num_rows)
    ]
    return RatingSession(rows, folder / "ratings.jsonl", texts[0], kind)


@pytest.fixture(scope="module")
def seen(browser: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the probe found, by colour scheme, then by page and width; every `details` is open."""
    folder = tmp_path_factory.mktemp("ratings")
    sessions = {name: session_of(folder, "scores" if name == "scores" else "choice") for name in PAGES}
    pages = {
        name: render_rating_page(session, None if name == "done" else session.next(), "token")
        for name, session in sessions.items()
    }
    schemes = (("light", False), ("dark", True))
    return {name: look(browser, tmp_path_factory.mktemp(name), pages, WIDTHS, dark) for name, dark in schemes}


@ANY
def test_the_page_is_never_wider_than_the_screen_and_runs_nothing(seen: dict[str, Any], name: str) -> None:
    found = seen["light"][name]
    assert found["width"] == int(name.split()[1])
    assert found["overflow"] == 0
    assert found["pwned"] == "no"
    assert found["title"].startswith("Rating by ")
    assert found["scripts"] == 1  # the probe
    assert found["requests"] == []


@ANY
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_background(seen: dict[str, Any], name: str, scheme: str) -> None:
    found = seen[scheme][name]
    assert found["dark"] is (scheme == "dark")
    ratio, text = found["lowest"]
    assert ratio >= 4.5, text
    assert found["smallest"] >= 12


def test_nothing_on_the_page_names_a_model(seen: dict[str, Any]) -> None:
    for name in ("choice 360", "scores 1000"):
        body = seen["light"][name]["body"].lower()
        assert "answer 1" in body
        assert "tuned" not in body.replace("\n".join(HOSTILE).lower(), "")


def test_the_browser_opens_the_served_page_under_its_policy(browser: str, tmp_path: Path) -> None:
    with RatingServer(session_of(tmp_path, "choice")) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [browser, *flags, "--dump-dom", server.url], capture_output=True, text=True, timeout=60, check=True
        )
        server.shutdown()
        thread.join()
    assert "0 of 3 rated" in done.stdout
    assert "1 is better" in done.stdout
