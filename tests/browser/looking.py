"""Opens pages in a headless Chromium and says how they came out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

PROBE = (Path(__file__).parent / "probe.js").read_text(encoding="utf-8")
# The page forbids scripts; a copy that does not shows that none would run, and lets the probe look.
POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
COLLECT = """
const found = {};
addEventListener("message", event => {
  found[event.data.name] = event.data;
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


class _Found(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = ("id", "found") in attrs

    def handle_data(self, data: str) -> None:
        self.text += data if self._inside else ""


def look(browser: str, folder: Path, pages: dict[str, str], widths: Sequence[int], dark: bool) -> dict[str, Any]:
    """Open each page in frames of these widths (a window is never narrower than 500 pixels); what the probe found."""
    frames = []
    for name, page in pages.items():
        assert page.count(POLICY) == 1
        assert page.count("</body>\n</html>") == 1
        for width in widths:
            probe = f"<script>const NAME = {json.dumps(f'{name} {width}')};\n{PROBE}</script>\n</body>\n</html>"
            file = folder / f"{name}-{width}.html"
            file.write_text(page.replace(POLICY, "").replace("</body>\n</html>", probe), encoding="utf-8")
            frames.append(f'<iframe src="{file.name}" style="width:{width}px;height:900px;border:0"></iframe>')
    index = folder / "index.html"
    index.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre><script>{COLLECT}</script>{"".join(frames)}'
    )
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=5000"]
    flags += [
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,900",
        *(["--force-dark-mode"] if dark else []),
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", index.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = _Found()
    found.feed(done.stdout)
    seen: dict[str, Any] = json.loads(found.text)
    assert len(seen) == len(frames)
    return seen


def assert_contained(found: dict[str, Any], width: int) -> None:
    """The page is no wider than the screen, runs nothing and asks for nothing."""
    assert found["width"] == width
    assert found["overflow"] == 0
    assert found["pwned"] == "no"
    assert found["scripts"] == 1  # the probe
    assert found["requests"] == []


def assert_readable(found: dict[str, Any], scheme: str) -> None:
    """All text stands out from its background and is large enough."""
    assert found["dark"] is (scheme == "dark")
    ratio, text = found["lowest"]
    assert ratio >= 4.5, text
    assert found["smallest"] >= 12
