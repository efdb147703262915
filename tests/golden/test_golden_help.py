"""Help and launch, pinned as text; `pytest --write-golden` writes them anew, for a reviewer to read."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from packhorse.cli.main import VERBS, read_command
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import list_recipes

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[2]


def help_text() -> str:
    pages = [read_command(["--help"]), *(read_command([verb, "--help"]) for verb in VERBS)]
    return "\n----\n".join(str(page) for page in pages)


def launches() -> str:
    """The launch of every shipped recipe, on 8 GPUs or on the laptop that it is for."""
    lines = []
    for recipe in list_recipes():
        ask = DeviceRequest() if recipe.name.startswith("quickstart/") else DeviceRequest(gpus=8)
        plan = make_plan(load_recipe(recipe.name), ask, Hardware(num_cores=2, gpus=()), None)
        words = shlex.join(plan.argv).replace(str(ROOT), "ROOT").replace(str(Path.cwd()), "HERE")
        env = " ".join(f"{name}={value}" for name, value in plan.env.items())
        lines.append(f"{recipe.name}\n  {words}\n  {env}\n")
    return "\n".join(lines)


@pytest.mark.parametrize(("name", "make"), [("help.txt", help_text), ("launches.txt", launches)])
def test_text_is_as_reviewed(name: str, make, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = make()
    if request.config.getoption("--write-golden"):
        (HERE / name).write_text(text, encoding="utf-8")
    assert text == (HERE / name).read_text(encoding="utf-8")
