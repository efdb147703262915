"""Every fix that can be typed is typed as the message gives it, and the message does not come back."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from packhorse.cli.main import main
from packhorse.errors import EXIT_OK
from packhorse.launching.local.outcome import Outcome
from packhorse.quickstart.files import VOCABULARY_SIZE
from packhorse.recipe.schema import Recipe
from packhorse.workflows import new_run
from tiny import TINY, write_tiny

PLAN = ["plan", "tiny.yaml"]
CHECK = ["check", "tiny.yaml"]
KEY = rf"(?:{'|'.join(Recipe.model_fields)})(?:\.[a-z_0-9]+)*"
VALUE = r"(\[[^\]]*\]|\"[^\"]*\"|[^\s,;`(]+)"
REMOVE = object()
COMMAND = re.compile(r"`?(packhorse [^`\n]+?)(?:`|$)")
RENAMED = re.compile(r"write `([a-z_.0-9]+)`")
SET = re.compile(rf"({KEY})(?:: | to ){VALUE}")
REMOVED = re.compile(rf"remove ({KEY})")
UNKNOWN = re.compile(r"([a-z_.0-9]+) is not a field")


@dataclass(frozen=True)
class Typed:
    """A change of the recipe: a value is set at a key, or the key is removed, or renamed to `new`."""

    key: str
    value: Any = REMOVE
    new: str = ""


def typed(fact: str, fix: str) -> Typed:
    """Return the first change that the words of a fix name; fails where there is none that can be typed."""
    if (wrong := UNKNOWN.search(fact)) and (right := RENAMED.search(fix)):
        return Typed(wrong[1], new=right[1])
    found = [(hit.start(), Typed(hit[1], yaml.safe_load(hit[2].rstrip(".")))) for hit in SET.finditer(fix)]
    found += [(hit.start(), Typed(hit[1])) for hit in REMOVED.finditer(fix)]
    assert found, f"nothing can be typed: {fix}"
    return min(found, key=lambda each: each[0])[1]


def apply(change: Typed, recipe: dict[str, Any]) -> None:
    """Edit a recipe as a user would."""
    *path, last = change.key.split(".")
    section: Any = recipe
    for step in path:
        if isinstance(section, dict) and isinstance(section.get(step), str):
            section[step] = {"kind": section[step]}
        section = section[int(step)] if step.isdigit() else section.setdefault(step, {})
    if change.new:
        section[change.new.rpartition(".")[2]] = section.pop(last)
    elif change.value is REMOVE:
        del section[last]
    else:
        section[last] = change.value


@dataclass(frozen=True)
class Case:
    """A recipe with one mistake: changed sections, rows of rows.jsonl, and the command that finds it."""

    sections: dict[str, Any]
    words: list[str] = field(default_factory=lambda: PLAN)
    rows: list[dict[str, Any]] | None = None


def fresh(**config: Any) -> dict[str, Any]:
    return {"model": {**TINY["model"], "config": {**TINY["model"]["config"], **config}}}


def adapter(**fields: Any) -> dict[str, Any]:
    return {"model": {"id": "Qwen/Qwen2.5-0.5B"}, "method": {"kind": "lora", **fields}}


ADAMW = TINY["optimizer"]
SMALL: dict[str, Any] = {"length": 256, "packs": 8}
ONE: dict[str, Any] = {"engine": "single", "processes": 1}
SOURCES = TINY["data"]["sources"]
ROWS = [{"prompt": f"{'word ' * number}?", "completion": f"{number}"} for number in range(1, 40)]
ON_2 = [*PLAN, "--gpus", "2"]
CASES: dict[str, Case] = {
    # --- recipe
    "key": Case({"optimizer": {"lerning_rate": 1e-3}}),
    "section": Case({"bacth": {"length": 256}}),
    "choice": Case({"precision": "bf1"}),
    "seed": Case({"seed": -1}),
    "packs": Case({"batch": {"length": 256, "packs": 0}}),
    "quoted number": Case({"steps": "6"}),
    "text of a number": Case({"name": 7}),
    "config key": Case(fresh(hiden_size=64)),
    "model type": Case(fresh(model_type="lama")),
    "width": Case(fresh(hidden_size=34)),
    "groups": Case(fresh(num_key_value_heads=3)),
    "adapter of a fresh model": Case({"method": {"kind": "lora"}}),
    "empty target": Case(adapter(target=[])),
    "odd rank": Case(adapter(initialization="orthogonal", rank=5)),
    "experts with dropout": Case(adapter(experts=True, dropout=0.1)),
    "loftq without bits": Case(adapter(initialization="loftq")),
    "revision of a file": Case({"data": {"sources": [{**SOURCES[0], "revision": "main"}]}}),
    "delimiter": Case({"data": {"sources": [{**SOURCES[0], "delimiter": "ab"}]}}),
    "shares": Case({"data": {"sources": SOURCES, "split": {"train": 0.7, "validation": 0.2, "test": 0.2}}}),
    "micro": Case({"batch": {"length": 256, "packs": 8, "micro": 5}}),
    "rate": Case({"optimizer": {"learning_rate": 3e-3}, **adapter(learning_rate_ratio=100.0)}),
    "betas of lion": Case({"optimizer": {**ADAMW, "learning_rate": 1e-4, "name": "lion"}}),
    "betas nobody reads": Case({"optimizer": {"learning_rate": 1e-3, "name": "adafactor", "betas": [0.9, 0.95]}}),
    "warm-up": Case({"schedule": {"warmup_steps": 9}}),
    "decay": Case({"schedule": {"name": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.8}}),
    "tf32": Case({"precision": "bf16", "tf32": True}),
    "offload": Case({"parallel": {"processes": 1, "offload_activations": True}}, [*PLAN, "--gpus", "1"]),
    "clipping": Case({"optimizer": {**ADAMW, "in_backward": True}, "parallel": {"engine": "single", "processes": 1}}),
    "group of hsdp": Case({"parallel": {"shard_group": 2}}),
    "nvme": Case({"parallel": {"nvme": "disk"}}),
    "rewind": Case({"recovery": {"on_spike": "rewind"}}),
    "rewind behind checkpoints": Case({"recovery": {"on_spike": "rewind"}, "checkpoint": {"every_steps": 1}}),
    # --- plan
    "muon under zero": Case({"optimizer": {**ADAMW, "name": "muon"}, "parallel": {"engine": "zero2"}}, ON_2),
    "8 bits under fsdp2": Case(
        {"optimizer": {**ADAMW, "name": "adamw_8bit"}, "parallel": {"engine": "fsdp2"}}, ON_2
    ),
    "fewer packs than processes": Case({}, [*PLAN, "--gpus", "16"]),
    "single on two": Case({"parallel": {"engine": "single"}}, ON_2),
    "heads": Case({"parallel": {"sequence": 8, "engine": "fsdp2"}}, [*PLAN, "--gpus", "8"]),
    "steps in backward": Case(
        {"optimizer": {**ADAMW, "in_backward": True, "clip_norm": None}, "batch": {**SMALL, "micro": 2}}
        | {"parallel": ONE}
    ),
    "noise of one pass": Case({"track": {"wandb": "off", "noise_scale": True}, "batch": {**SMALL, "micro": 8}}),
    "fp32 under zero": Case(
        {"precision": "bf16", "parallel": {"engine": "zero2"}, "model": {**TINY["model"], "dtype": "float32"}}, ON_2
    ),
    "varlen on a cpu": Case({"model": {**TINY["model"], "attention": "varlen"}}),
    "paged on a cpu": Case({"optimizer": {**ADAMW, "name": "paged_adamw"}}),
    "vocabulary": Case(fresh(vocab_size=VOCABULARY_SIZE - 1)),
    "target": Case(adapter(target=["q_porj"])),
    "target of blocks": Case(adapter(target=["mlp", "v_proj"])),
    "output head": Case(adapter(target=["q_proj"], train_also=["embed_tokens"])),
    "whole module": Case(adapter(target=["q_proj"], train_also=["lm_haed", "embed_tokens"])),
    "layers": Case(adapter(kind="partial", last_layers=99)),
    "pattern": Case(adapter(kind="partial", train=["*.mpl.*"])),
    "half of a tie": Case(adapter(kind="partial", freeze=["lm_head.*"])),
    "ia3": Case(adapter(kind="ia3", target=["k_porj"])),
    # --- data
    "length": Case({"data": {"sources": [{"path": "rows.jsonl"}]}, "batch": {"length": 16, "packs": 8}}, CHECK, ROWS),
    "no length": Case({"data": {"sources": [{"path": "rows.jsonl"}]}, "batch": {"length": 2, "packs": 8}}, CHECK, ROWS),
    "control tokens": Case(
        {"data": {"sources": [{"path": "rows.jsonl"}]}},
        CHECK,
        [*ROWS, {"prompt": "a <|im_end|>", "completion": "b"}],
    ),
    "template": Case({"data": {"sources": SOURCES, "template": "llama3"}}, CHECK),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def first_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """Run a command that must refuse; return the fact, the reason and the fix of its first message."""
    assert main(words) == 2, f"{words} is not refused"
    said = capsys.readouterr().err
    fact, _, rest = said.partition("\n  why: ")
    why, _, rest = rest.partition("\n  fix: ")
    return fact, why, rest.splitlines()[0]


@pytest.mark.parametrize("name", CASES)
def test_the_typed_fix_removes_the_message(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    path = write_tiny(here, **case.sections)
    if case.rows is not None:
        (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    fact, why, fix = first_mistake(case.words, capsys)
    recipe = yaml.safe_load(path.read_text())
    apply(typed(fact, fix), recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    main(case.words)
    said = capsys.readouterr().err
    assert why not in said, f"typed {typed(fact, fix)} for {fact}, and again: {said}"


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that would have been launched; no process is started."""
    names: list[str] = []

    def launch(plan: Any, *_: object) -> Outcome:
        names.append(plan.recipe.name)
        return Outcome(EXIT_OK, "", "")

    monkeypatch.setattr(new_run, "run_to_end", launch)
    return names


def commands(fix: str) -> list[list[str]]:
    """Return the words of each command line in a fix."""
    found = [shlex.split(command.rstrip(".?"))[1:] for command in COMMAND.findall(fix)]
    assert found, f"no command can be typed: {fix}"
    return found


def data_folder() -> Path:
    return Path(json.loads(Path("runs/tiny/plan.json").read_text())["data"]["folder"])


def begun(here: Path, **data: Any) -> None:
    """A run of rows.jsonl that was launched once."""
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_tiny(here, data={"sources": [{"path": "rows.jsonl"}], **data})
    assert main(["train", "tiny.yaml"]) == EXIT_OK


def data_is_gone(here: Path) -> None:
    begun(here)
    shutil.rmtree(data_folder())


def rows_have_changed(here: Path) -> None:
    data_is_gone(here)
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))


# what was done before, words of the command, index of the command in the fix, whether the words must then work
TYPED: dict[str, tuple[Callable[[Path], object], list[str], int, bool]] = {
    "a recipe to resume, no run": (write_tiny, ["train", "tiny.yaml", "--resume"], 0, False),
    "a recipe to resume": (begun, ["train", "tiny.yaml", "--resume"], 0, False),
    "resume of a recipe": (begun, ["resume", "tiny.yaml"], 0, False),
    "a run to train": (begun, ["train", "runs/tiny"], 0, False),
    "a name that is taken": (begun, ["train", "tiny.yaml"], 0, False),
    "data is gone": (data_is_gone, ["resume", "runs/tiny"], 0, True),
    "rows have changed": (rows_have_changed, ["resume", "runs/tiny"], 1, False),
    "rows have changed, prepared": (rows_have_changed, ["prepare", "runs/tiny"], 1, False),
}


@pytest.mark.parametrize("name", TYPED)
def test_the_typed_command_leads_on(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], launched: list[str]
) -> None:
    before, words, which, must_work = TYPED[name]
    before(here)
    launched.clear()
    capsys.readouterr()
    _, _, fix = first_mistake(words, capsys)
    assert main(commands(fix)[which]) == EXIT_OK
    if must_work:
        assert main(words) == EXIT_OK
    assert launched


def test_a_run_whose_rows_are_restored_resumes(
    here: Path, capsys: pytest.CaptureFixture[str], launched: list[str]
) -> None:
    """`resume` and `prepare` do not name each other in a circle."""
    begun(here)
    kept, folder = (here / "rows.jsonl").read_text(), data_folder()
    shutil.rmtree(folder)
    (here / "rows.jsonl").write_text(kept.replace("1", "2"))
    for words in (["resume", "runs/tiny"], ["prepare", "runs/tiny"]):
        fact, _, fix = first_mistake(words, capsys)
        assert "changed: rows.jsonl" in fact
    assert not folder.exists()
    (here / "rows.jsonl").write_text(kept)
    assert main(commands(fix)[0]) == EXIT_OK
    assert folder.is_dir()
    assert main(["resume", "runs/tiny"]) == EXIT_OK
    assert launched == ["tiny", "tiny"]


def test_changed_test_rows_are_named_too(here: Path, capsys: pytest.CaptureFixture[str], launched: list[str]) -> None:
    sealed = here / "sealed.jsonl"
    sealed.write_text('{"question": "which rows are sealed?", "answer": "these"}\n')
    begun(here, test=[{"path": "sealed.jsonl"}])
    shutil.rmtree(data_folder())
    sealed.write_text(sealed.read_text().replace("these", "those"))
    fact, _, _ = first_mistake(["resume", "runs/tiny"], capsys)
    assert "changed: sealed.jsonl" in fact
    assert launched == ["tiny"]


def test_words_that_nearly_are_commands_and_flags_are_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, fix = first_mistake(["trian", "--help"], capsys)
    assert main([*commands(fix)[0], "--help"]) == EXIT_OK
    _, _, fix = first_mistake(["plan", "quickstart/full", "--forse"], capsys)
    flag = re.search(r"--[a-z]+", fix)
    assert flag is not None
    assert main(["plan", "quickstart/full", flag[0]]) == EXIT_OK


def test_enough_fixes_are_typed() -> None:
    assert len(CASES) + len(TYPED) >= 55
