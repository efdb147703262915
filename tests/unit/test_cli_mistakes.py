"""Each likely mistake gets one clear error, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from packhorse.cli.main import main, read_command
from tiny import TINY, write_tiny

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def data(**fields: Any) -> dict[str, Any]:
    return {"data": {"sources": [{"path": "rows.jsonl"}], **fields}}


NO_MARKERS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MANY = [
    {"messages": [{"role": "user", "content": f"what is {n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(40)
]

# rows of rows.jsonl, changed sections of the recipe, words of the command, what the error must say
CASES: dict[str, tuple[bytes, dict[str, Any], list[str], list[str]]] = {
    "mistyped key": (
        lines(CHAT),
        {},
        ["check", "tiny.yaml", "optimizer.lerning_rate=1"],
        ["lerning_rate", "learning_rate"],
    ),
    "wrong type": (lines(CHAT), {"steps": "many"}, ["check", "tiny.yaml"], ["tiny.yaml:", "steps", "many", "number"]),
    "missing recipe": (lines(CHAT), {}, ["check", "tyni.yaml"], ["tyni.yaml"]),
    "missing file": (b"", data(sources=[{"path": "row.jsonl"}]), ["check", "tiny.yaml"], ["row.jsonl", "rows.jsonl"]),
    "empty file": (b"", data(), ["check", "tiny.yaml"], ["rows.jsonl", "empty"]),
    "broken line": (lines(*MANY, b'{"messages": [\n'), data(), ["check", "tiny.yaml"], ["rows.jsonl:41"]),
    "another format": (
        lines(*MANY),
        data(sources=[{"path": "rows.jsonl", "format": "alpaca"}]),
        ["check", "tiny.yaml"],
        ["rows.jsonl:1", "alpaca", "messages"],
    ),
    "unknown role": (
        lines(*MANY, {"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        data(),
        ["check", "tiny.yaml"],
        ["rows.jsonl:41", "usr", "user"],
    ),
    "template without markers": (
        lines(*MANY),
        data(template="plain.jinja"),
        ["check", "tiny.yaml"],
        ["{% generation %}"],
    ),
    "no assistant turn": (
        lines(*MANY, {"messages": [{"role": "user", "content": "a"}]}),
        data(),
        ["check", "tiny.yaml"],
        ["rows.jsonl:41", "assistant"],
    ),
    "T too small": (
        lines(*MANY),
        data() | {"batch": {"length": 4, "packs": 8}},
        ["check", "tiny.yaml"],
        ["batch.length", "4"],
    ),
    "model folder without config": (
        lines(*MANY),
        {"model": {"path": ".", "tokenizer": "builtin:tokenizer"}},
        ["train", "tiny.yaml"],
        ["model.path", "config.json"],
    ),
    "more processes than devices": (
        lines(*MANY),
        {"parallel": {"processes": 4000}, "batch": {"packs": 4000, "length": 256}},
        ["train", "tiny.yaml"],
        ["4000 processes", "parallel.processes"],
    ),
    "fewer packs than processes": (
        lines(*MANY),
        {},
        ["plan", "tiny.yaml", "--gpus", "10"],
        ["batch.packs", "10"],
    ),
    "unwritable place": (lines(*MANY), {"runs_folder": "/proc/runs"}, ["train", "tiny.yaml"], ["/proc", "runs_folder"]),
    "no such run": (lines(CHAT), {}, ["status", "runs/nothing"], ["runs/nothing", "plan.json"]),
    "mistyped command": (lines(CHAT), {}, ["trian"], ["trian", "packhorse train"]),
    "mistyped flag": (lines(CHAT), {}, ["train", "tiny.yaml", "--resme"], ["--resme", "--resume"]),
    "missing argument": (lines(CHAT), {}, ["train"], ["packhorse train RECIPE"]),
    "a count that is none": (lines(CHAT), {}, ["plan", "tiny.yaml", "--gpus", "many"], ["no GPU is called 'many'"]),
}


@pytest.mark.parametrize("name", CASES, ids=str)
def test_a_mistake_gets_one_clear_error_and_leaves_nothing(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, sections, words, must_say = CASES[name]
    (here / "rows.jsonl").write_bytes(rows)
    (here / "plain.jinja").write_text(NO_MARKERS)
    write_tiny(here, **sections)
    assert main(words) == 2
    said = capsys.readouterr().err
    for text in must_say:
        assert text in said, said
    assert "  why: " in said
    assert "  fix: " in said
    assert "Traceback" not in said
    assert not list(here.glob("runs/[!.]*"))
    assert not list(here.glob("runs/.data/*/data.json"))
    assert not list(here.glob("runs/.*draft*"))


def test_all_mistakes_of_a_recipe_are_told_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here, steps="many", precision="fp8", schedule={"nam": "cosine"})
    assert main(["check", "tiny.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("  fix: ") == 3
    assert said.count("tiny.yaml:") == 3


@pytest.mark.parametrize("verb", ["", "recipes", "check", "prepare", "plan", "train", "status", "evaluate", "chat"])
def test_help_shows_help_and_does_nothing(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here)
    words = [verb, "tiny.yaml", "--help"] if verb else ["--help"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert f"packhorse {verb}" in out
    assert err == ""
    assert [path.name for path in here.iterdir()] == ["tiny.yaml"]


def test_a_secret_in_the_environment_is_never_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWS", str(here / "hidden-7f3a"))
    (here / "hidden-7f3a").mkdir()
    (here / "hidden-7f3a" / "rows.jsonl").write_bytes(lines(*MANY))
    write_tiny(here, **data(sources=[{"path": "${env:ROWS}/rows.jsonl"}]))
    assert main(["plan", "tiny.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "hidden-7f3a" not in out + err


def test_the_tiny_recipe_itself_is_right(here: Path) -> None:
    write_tiny(here)
    assert TINY["name"] == "tiny"
    assert main(["plan", "tiny.yaml"]) == 0


def test_a_run_may_be_called_like_a_command() -> None:
    action = read_command(["status", "status"])
    assert not isinstance(action, str)
    assert action.arguments == {"run": "status"}
