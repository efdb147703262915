"""The page for blind ratings as a real browser shows it: narrow, wide, light, dark, with hostile answers."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from looking import assert_contained, assert_readable, look

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
    assert_contained(seen["light"][name], int(name.split()[1]))
    assert seen["light"][name]["title"].startswith("Rating by ")


@ANY
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_background(seen: dict[str, Any], name: str, scheme: str) -> None:
    assert_readable(seen[scheme][name], scheme)


def test_nothing_on_the_page_names_a_model(seen: dict[str, Any]) -> None:
    for name in ("choice 360", "scores 1000"):
        body = seen["light"][name]["body"].lower()
        assert "answer 1" in body
        assert "tuned" not in body.replace("\n".join(HOSTILE).lower(), "")


class Tab:
    """A tab of a headless browser, driven over a pipe (Chrome DevTools Protocol)."""

    def __init__(self, browser: str, folder: Path, url: str) -> None:
        (low_read, self._write), (self._read, low_write) = os.pipe(), os.pipe()
        # The browser reads from 3 and writes to 4, which must not be one of these.
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (low_read, low_write))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, browser, *flags], pass_fds=(read, write), stderr=subprocess.DEVNULL
        )
        for end in (low_read, low_write, read, write):
            os.close(end)
        self._replies = os.fdopen(self._read, "rb")
        self._number, self._session = 0, {}
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = json.loads(
                b"".join(iter(lambda: self._replies.read(1) or pytest.fail("the browser has ended"), b"\0"))
            )
            if found.get("id") == self._number:
                return found.get("result", {})

    def run(self, script: str) -> Any:
        """Value of an expression in the page; None while it loads."""
        return self._call("Runtime.evaluate", expression=script).get("result", {}).get("value")

    def wait_until(self, script: str) -> None:
        """Wait until an expression in the page is true."""
        deadline = time.monotonic() + 60
        while self.run(script) is not True:
            assert time.monotonic() < deadline, script
            time.sleep(0.02)

    def wait_for(self, text: str) -> None:
        """Wait until the page shows a text."""
        self.wait_until(f"document.body.innerText.includes({json.dumps(text)})")

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._replies.close()
        os.close(self._write)


@pytest.mark.parametrize("kind", ["choice", "scores"])
def test_a_rater_clicks_through_all_rows(browser: str, tmp_path: Path, kind: Kind) -> None:
    with RatingServer(session_of(tmp_path, kind)) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with closing(Tab(browser, tmp_path, server.url)) as tab:
            tab.wait_for("0 of 3 rated")
            row = tab.run("document.querySelector('[name=row]').value")
            tab.run("document.querySelector('[value=skip]').click()")
            tab.wait_until(f"document.querySelector('[name=row]').value !== {json.dumps(row)}")
            for number in (1, 2, 3):
                tab.wait_for(f"{number - 1} of 3 rated")
                if kind == "scores":
                    tab.run("for (const box of document.querySelectorAll('[value=\"4\"]')) box.checked = true")
                tab.run(f"document.querySelector('[value={'first' if kind == 'choice' else 'scores'}]').click()")
                tab.wait_for(f"{number} of 3 rated")
            tab.wait_for("All rows are rated")
        server.shutdown()
    ratings = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert len({rating["row"] for rating in ratings}) == 3
    assert {(rating["base"], rating["tuned"]) for rating in ratings} <= (
        {(1, 0), (0, 1)} if kind == "choice" else {(4, 4)}
    )
