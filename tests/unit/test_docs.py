"""The documentation says what the code does: commands parse, links lead somewhere, the reference is the schema's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from packhorse.cli.main import COMMAND_TABLE, Action, read_command
from packhorse.errors import UserError
from packhorse.recipe.describe import reference
from packhorse.track.meter import Meter, evaluation_figures

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "slurm").glob("*.md")])
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_of(text: str) -> Iterator[str]:
    """Lines of code blocks that type `packhorse`, with or without a prompt."""
    for block in FENCE.findall(text):
        for line in block.splitlines():
            typed = line.strip().removeprefix("$ ")
            if typed.startswith("packhorse "):
                yield typed


def anchors_of(text: str) -> set[str]:
    """Anchors that GitHub makes of headings: lower case, spaces as dashes, other signs dropped."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = {
    command: page_name(page) for page in reversed(PAGES) for command in commands_of(page.read_text(encoding="utf-8"))
}
"""Each command once, and the first page that shows it."""


def test_every_command_in_the_documentation_is_one() -> None:
    assert len(COMMANDS) > 40
    refused = []
    for command, page in COMMANDS.items():
        try:
            assert isinstance(read_command(shlex.split(command, comments=True)[1:]), Action)
        except (UserError, AssertionError) as error:
            refused.append(f"{page}: {command}: {error}")
    assert refused == []


def test_every_verb_is_in_the_documentation() -> None:
    assert {shlex.split(command, comments=True)[1] for command in COMMANDS} == set(COMMAND_TABLE)


def test_a_command_that_is_none_would_be_found() -> None:
    (typed,) = commands_of("text\n```\n$ packhorse trian RECIPE\nother\n```\n")
    with pytest.raises(UserError, match="trian"):
        read_command(shlex.split(typed)[1:])


def broken_links(page: Path) -> Iterator[str]:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        leads = file.is_file() and file.is_relative_to(ROOT)
        if not leads or (anchor and anchor not in anchors_of(file.read_text(encoding="utf-8"))):
            yield f"{page_name(page)}: {target}"


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    assert [link for page in PAGES for link in broken_links(page)] == []


def test_the_recipe_page_holds_the_reference_of_the_schema() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert reference().strip() in page, "put the output of `packhorse recipes reference` into docs/recipe.md"


def test_the_track_page_names_every_figure_of_a_step() -> None:
    seconds = iter(range(10))
    meter = Meter(clock=lambda: float(next(seconds)))
    meter.count_step(1, 1, 1)
    figures = meter.read(loss=1.0, learning_rate=1.0, grad_norm=1.0, epoch=1.0) | evaluation_figures(1.0)
    page = (ROOT / "docs" / "track.md").read_text(encoding="utf-8")
    assert [key for key in figures if f"| `{key}` |" not in page] == []


def test_no_page_names_a_place_that_a_user_does_not_have() -> None:
    places = (str(ROOT), str(Path.home()), "../shared")
    texts = {page_name(page): page.read_text(encoding="utf-8") for page in PAGES}
    assert [f"{page}: {path}" for page, text in texts.items() for path in places if f"{path}/" in text] == []


def test_the_table_of_proofs_names_every_module_that_refuses() -> None:
    """Whoever adds a refusal to the worker or the launcher says where it is made, and why not earlier."""
    source = ROOT / "src" / "packhorse"
    table = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("## Where each proof is made")[2]
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)+)`", table))
    refusing = {
        path.relative_to(source).with_suffix("").as_posix()
        for package in ("train", "model", "launching")
        for path in (source / package).rglob("*.py")
        if re.search(r"\b(UserError|AnotherAttempt)\(|\braise [a-z_]\w*\(", path.read_text(encoding="utf-8"))
    }
    assert refusing - named == set()
    assert {name for name in named if not (source / f"{name}.py").is_file() and not (source / name).is_dir()} == set()
