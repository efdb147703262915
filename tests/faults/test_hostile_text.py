"""Text that a shell, a path or a hub would take for something else: refused, or carried to the last word unchanged."""

from __future__ import annotations

import ast
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.load import dump_recipe, load_recipe
from packhorse.recipe.schema import Recipe, recipe_view
from packhorse.run_folder.folder import open_run
from tiny import TINY, write_tiny

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = {
    "shell": " $(touch CANARY)`touch CANARY`; touch CANARY 'a' \"b\" \\ *?[a-z] # ",
    "line break": "x\ntouch CANARY",
    "flag": "-rf",
    "variable": "${IFS}touch",
    "control": "\x1b[31mred\x07",
}
PATHS = {
    "above": "../x",
    "absolute": "/etc/passwd",
    "up again": "a/../../b",
    "long": "n" * 300,
    "very long": "n/" * 700,
    "flag": "-rf",
    "nobody": "~nobody-of-this-name/x",
    "NUL": "a\0b",
    "line break": "a\nb",
}
Step = str | int | tuple[str, str]


def text_fields(schema: dict[str, Any], path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Where text may stand in a recipe, by its schema: a new field is tried without being named here."""
    schema = recipe_view().resolve(schema)
    for name, field in schema.get("properties", {}).items():
        yield from text_fields(field, (*path, name))
    for kind, reference in schema.get("discriminator", {}).get("mapping", {}).items():
        yield from text_fields({"$ref": reference}, (*path, ("kind", kind)))
    for branch in schema.get("anyOf", []):
        yield from text_fields(branch, path)
    if "items" in schema:
        yield from text_fields(schema["items"], (*path, 0))
    if schema.get("additionalProperties"):
        yield (*path, "a_key")
    if schema.get("type") == "string":
        yield path


FIELDS = sorted(set(text_fields(recipe_view().root)), key=str)


def with_text(path: tuple[Step, ...], text: str) -> dict[str, Any]:
    """A recipe that is right but for this text."""
    values = copy.deepcopy(TINY)
    leaf = path[-1]
    if path[0] == "method" or path[:2] in (("model", "id"), ("model", "revision")):
        values["model"] = {"id": "org/model"}
    if path == ("model", "path"):
        values["model"] = {}
    if leaf == "nvme":
        values["parallel"] = {"engine": "zero3_nvme", "processes": 1}
    if path[1:2] == ("decontaminate",):
        values["data"]["decontaminate"] = {"against": [{"path": "rows.jsonl"}]}
    here: Any = values
    for step, following in pairwise(path):
        if isinstance(step, tuple):
            here["kind"] = step[1]
        elif isinstance(step, int):
            here[:] = [{} if following in ("path", "id") else _source(leaf)]
            here = here[0]
        else:
            empty: Any = [] if isinstance(following, int) else {}
            if not isinstance(here.get(step), type(empty)):
                here[step] = empty
            here = here[step]
    if isinstance(leaf, int):
        here[:] = [text]
    else:
        here[leaf] = text
    return values


def _source(leaf: Step) -> dict[str, Any]:
    return {"id": "org/rows"} if leaf in ("id", "revision", "subset", "split") else {"path": "rows.jsonl"}


def value_at(values: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        values = values if isinstance(step, tuple) else values[step]
    return values


@pytest.fixture(autouse=True)
def inner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in another one that must stay as it is."""
    folder = tmp_path / "inner"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_every_text_of_a_recipe_is_refused_or_reaches_the_plan_unchanged(inner: Path) -> None:
    assert len(FIELDS) > 40, "the walk over the schema sees too little"
    here, carried = detect_hardware(), set()
    for path in FIELDS:
        for name, text in HOSTILE.items():
            file = inner / "r.yaml"
            file.write_text(yaml.safe_dump(with_text(path, text), sort_keys=False, allow_unicode=True))
            try:
                recipe = load_recipe(str(file))
                made = make_plan(recipe, DeviceRequest(), here, None)
            except UserError:
                continue
            assert value_at(recipe.model_dump(), path) == text, (path, name)
            assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe, (path, name)
            assert RunPlan.model_validate_json(made.model_dump_json()) == made
            assert made.argv[-1] == f"{made.run_folder}/plan.json"
            if path == ("runs_folder",):
                assert made.run_folder == f"{inner}/{text}/tiny"
            carried.add((path, name))
    # What is not refused is most of it: a rule that refused everything would carry nothing.
    free = {("runs_folder",), ("data", "template"), ("data", "sources", 0, "path"), ("track", "wandb_project")}
    keys = {
        ("data", "sources", 0, "columns", "a_key"),
        ("method", ("kind", "lora"), "target", 0),
        ("data", "split", "group_by"),
    }
    assert {(path, "line break") for path in keys} <= carried
    assert {(path, name) for path in free for name in ("shell", "flag")} <= carried
    assert not {(path, name) for path, name in carried if path in free and name in ("line break", "control")}
    assert {path for path, _ in carried}.isdisjoint({("name",), ("model", "id"), ("model", "revision")})
    assert {path.name for path in inner.iterdir()} == {"r.yaml"}


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_a_path_that_is_none_is_one_clear_error_and_nothing_is_written(
    text: str, inner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(inner)
    before = {path: path.stat().st_mtime_ns for path in inner.parent.rglob("*")}
    commands = [[verb, text] for verb in ("status", "verify", "plan", "check", "prepare", "train")]
    commands += [
        ["train", text, "--resume"],
        ["convert", "builtin:core.messages.jsonl", f"{text}/x", "--to", "messages"],
    ]
    commands += [["plan", "tiny.yaml", f"name={text}"]]
    fields = ["model.id", "model.revision", "data.sources.0.id", "data.sources.0.revision"]
    commands += [["plan", "tiny.yaml", "model.config=null", "model.id=org/x", f"{field}={text}"] for field in fields]
    for words in commands:
        code, told = main(words), capsys.readouterr().err
        assert code == 2, (words, told)
        assert "Traceback" not in told
        assert "\n  fix: " in told
    assert {path: path.stat().st_mtime_ns for path in inner.parent.rglob("*")} == before


def test_bytes_that_are_no_text_are_refused(inner: Path) -> None:
    """As Python reads the byte 0xFF of a command line."""
    write_tiny(inner)
    for field in ("runs_folder", "data.template", "data.sources.0.path", "model.tokenizer", "track.wandb_project"):
        with pytest.raises(UserError, match=r"U\+DCFF"):
            load_recipe("tiny.yaml", [f"{field}=\udcffx"])


def test_a_run_is_made_in_its_own_folder_and_not_behind_a_link(inner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(inner)
    (elsewhere := inner.parent / "elsewhere").mkdir()
    (inner / "runs").mkdir()
    for target in (elsewhere, inner.parent / "not-there"):
        (inner / "runs" / "tiny").symlink_to(target)
        assert main(["train", "tiny.yaml"]) == 2
        assert f"runs/tiny is a link to {target}" in capsys.readouterr().err
        (inner / "runs" / "tiny").unlink()
    assert list(elsewhere.iterdir()) == []
    assert not (inner.parent / "not-there").exists()


def test_a_name_of_a_run_is_looked_up_below_runs_and_never_above(inner: Path) -> None:
    (inner / "runs").mkdir()
    (inner / "secret").mkdir()
    (inner / "secret" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"\.\./secret contains no plan.json"):
        open_run("../secret")


def test_the_job_script_gives_the_launch_the_words_of_the_plan(inner: Path) -> None:
    """Run by bash, with stubs for Slurm and accelerate: nothing in the name of the run is taken for a command."""
    write_tiny(inner)
    assert main(["plan", "tiny.yaml", "parallel.processes=1", "--nodes", "1", "--write"]) == 0
    run = inner / "runs" / "$(touch CANARY) `touch CANARY`; touch CANARY; 'a' \"b\" * #"
    (inner / "runs" / "tiny").rename(run)
    stubs = inner / "stubs"
    stubs.mkdir()
    shift = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
    for name, body in {
        "srun": shift,
        "accelerate": f"printf '%s\\0' \"$@\" > {inner}/words",
        "scontrol": "echo node1",
        "scancel": "true",
    }.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "GPUS_ON_NODE": "1", "NNODES": "1", "JOB_NODELIST": "node1", "NODEID": "0"}
    path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "job.sbatch"), str(run.relative_to(inner))],
        cwd=inner,
        env={**os.environ, **{f"SLURM_{key}": value for key, value in slurm.items()}, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    # The doctor wrote into a folder of that name; the launch that trains nothing is told, with the same name.
    assert "10 checks, 10 ok" in done.stderr
    assert (
        f"the ranks ended without a message; its last lines (all of it in {run.relative_to(inner)}/logs/" in done.stderr
    )
    words = (inner / "words").read_bytes().decode().split("\0")[:-1]
    assert tuple(words[-len(open_run(str(run)).argv[2:]) :]) == open_run(str(run)).argv[2:]
    assert words[-1] == f"{run}/plan.json"
    assert not list(inner.parent.rglob("CANARY"))


SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "commands"}
NEVER_CALLED = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "yaml.load"),
    *("torch.load", "torch.save", "torch.multiprocessing.spawn", "yaml.unsafe_load", "yaml.full_load"),
}


def faults_in(source: str) -> list[str]:
    """Shells, pickles and code made of text, in a module's source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in NEVER_IMPORTED]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NEVER_IMPORTED:
            found.append(str(node.module))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in NEVER_CALLED or ("_object" in name and name.startswith("dist.")) else []
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [f"{key}={given[key]}" for key in ("shell", "allow_pickle") if given.get(key, "False") != "False"]
            found += ["weights_only=False"] if given.get("weights_only") == "False" else []
    return found


def test_no_module_opens_a_shell_or_a_pickle() -> None:
    found = {str(path.relative_to(ROOT)): faults_in(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: faults for path, faults in found.items() if faults} == {}


def test_a_shell_or_a_pickle_would_be_seen() -> None:
    assert faults_in("import subprocess; subprocess.run('x', shell=True)") == ["shell=True"]
    assert faults_in("from pickle import loads") == ["pickle"]
    assert faults_in("import os, dill\nos.system('x'); torch.load('f', weights_only=False)") == [
        *("dill", "os.system", "torch.load", "weights_only=False")
    ]
    assert faults_in("np.load(f, allow_pickle=True); dist.broadcast_object_list(x)") == [
        *("allow_pickle=True", "dist.broadcast_object_list")
    ]
