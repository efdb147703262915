"""Help and launch commands, pinned as text; `pytest --write-golden` writes them again, for a reviewer to read."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from packhorse.cli.main import COMMAND_TABLE, read_command
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import list_recipes
from packhorse.workflows.submit_run import SubmitRequest

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[2]


def help_text() -> str:
    pages = [read_command(["--help"]), *(read_command([name, "--help"]) for name in COMMAND_TABLE)]
    return "\n----\n".join(str(page) for page in pages)


def commands_page() -> str:
    """docs/commands.md: every command and flag, from the table that also feeds Fire and `--help`."""
    lines = [
        "# Commands",
        "",
        "What `packhorse COMMAND --help` prints, on one page. `key=value` sets a field of the",
        "[recipe](recipe.md). RUN is a run folder, or the name of a run below `runs`.",
    ]
    for command in COMMAND_TABLE.values():
        lines += ["", f"## {command.name}", "", command.summary, ""]
        lines += [f"- `{usage}`" + (f": {comment}" if comment else "") for usage, comment in command.usage]
        if command.flags:
            lines += ["", "| flag | meaning |", "|---|---|"]
            lines += [f"| `{flag.typed.replace('|', '/')}` | {flag.help} |" for flag in command.flags]
        lines += ["", command.notes] if command.notes else []
    return "\n".join(lines) + "\n"


def launches() -> str:
    """The launch command of every shipped recipe, on 8 GPUs or on the laptop that it is for."""
    lines = []
    for recipe in list_recipes():
        ask = DeviceRequest() if recipe.name.startswith("quickstart/") else DeviceRequest(gpus=8)
        plan = make_plan(load_recipe(recipe.name), ask, Hardware(num_cores=2, gpus=()), None)
        words = shlex.join(plan.argv).replace(str(ROOT), "ROOT").replace(str(Path.cwd()), "HERE")
        env = " ".join(f"{name}={value}" for name, value in plan.env.items())
        lines.append(f"{recipe.name}\n  {words}\n  {env}\n")
    return "\n".join(lines)


GOLDEN = {
    "help": (HERE / "help.txt", help_text),
    "commands": (ROOT / "docs" / "commands.md", commands_page),
    "launches": (HERE / "launches.txt", launches),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_text_is_as_reviewed(name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, make = GOLDEN[name]
    text = make()
    if request.config.getoption("--write-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMAND_TABLE)
def test_the_function_of_a_command_takes_its_words_and_flags(name: str) -> None:
    command = COMMAND_TABLE[name]
    function = getattr(import_module(f"packhorse.cli.{command.module or name}"), name)
    overrides = ["overrides"] * command.takes_overrides
    more = [command.more_words] if command.more_words else []
    expected = [*(word for word, _ in command.words), *overrides, *more, *(flag.argument for flag in command.flags)]
    parameters = inspect.signature(function).parameters
    # `submit` and `pipeline` take the fields of their request together.
    fields = {field.name for field in dataclasses.fields(SubmitRequest)} if "requested" in parameters else set()
    assert sorted({*parameters} - {"requested"} | fields & {*expected}) == sorted(expected)
