"""One real run with secrets all around it: none of them is in anything that it leaves; and its data is watched."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cli import PACKHORSE, Typed, environment, packhorse
from packhorse.data.data_manifest import read_data_manifest
from packhorse.plan.run_plan import read_plan
from secrets_made_up import SECRETS
from tiny import write_tiny

IN_ENVIRONMENT = {
    "HF_TOKEN": SECRETS["hugging face"],
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "OPENAI_API_KEY": SECRETS["openai"],
    "DATABASE_PASSWORD": "correct horse battery staple",
    "MIRROR": SECRETS["address"],  # the name says nothing, the form does
}
# Where a user's shell would make something of it.
RUNS = "$(touch CANARY) `touch CANARY`; 'a' \"b\""
# A rank that dies with a secret on its lips: in a log line, a warning, a thread and the traceback.
LEAK = """
import builtins, os
real = builtins.__import__
def leak(*arguments):
    import logging, threading, warnings
    said = " ".join(os.environ[name] for name in {names!r})
    logging.getLogger("transformers").warning("as a library says it: %s", said)
    warnings.warn(said)
    thread = threading.Thread(target=lambda: 1 / 0 if not said else [][said])
    thread.start()
    thread.join()
    raise RuntimeError("401 for " + said)
def imported(name, *arguments, **named):
    module = real(name, *arguments, **named)
    if name == "packhorse.train.worker" and hasattr(module, "_work"):
        module._work = leak
    return module
if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
    builtins.__import__ = imported
"""


def typed(folder: Path, *words: str, **variables: str) -> Typed:
    env = {**environment(), **IN_ENVIRONMENT, **variables}
    env.pop("WANDB_MODE", None)
    done = subprocess.run(
        [str(PACKHORSE), *words], cwd=folder, env=env, capture_output=True, text=True, errors="replace", timeout=600
    )
    return Typed(done.returncode, done.stdout, done.stderr)


def secrets_in(content: bytes) -> list[str]:
    return [name for name, value in {**IN_ENVIRONMENT, **SECRETS}.items() if value.encode() in content]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, with W&B offline, and what each command said in `said-*.txt`."""
    place = tmp_path_factory.mktemp("security")
    write_tiny(
        place,
        runs_folder=RUNS,
        steps=2,
        evaluation={"max_answered_rows": 0},
        track={"wandb": "offline", "wandb_project": "a-name-to-find", "tensorboard": True},
    )
    done = typed(place, "train", "tiny.yaml")
    assert done.code == 0, done.err
    run = f"{RUNS}/tiny"
    for words in (["status", run], ["verify", run], ["plan", "tiny.yaml", "name=other"]):
        said = typed(place, *words)
        assert said.code == 0, said.err
        (place / f"said-{words[0]}.txt").write_text(said.out + said.err, encoding="utf-8")
    (place / "said-train.txt").write_text(done.out + done.err, encoding="utf-8")
    return place


def test_nothing_that_a_run_leaves_holds_a_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name: found for path in files if (found := secrets_in(path.read_bytes()))} == {}
    # The search sees what is there: also in W&B's own form, in checkpoints, in logs and on the console.
    run = folder / RUNS / "tiny"
    (offline,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"a-name-to-find" in offline.read_bytes()
    names = {path.relative_to(run).parts[0] for path in files if path.is_relative_to(run)}
    assert {
        "plan.json",
        "recipe.yaml",
        "data.json",
        "status.json",
        "metrics.jsonl",
        "checkpoints",
        "logs",
        "wandb",
    } <= names
    assert {"model", "tensorboard"} <= names


def test_a_hostile_runs_folder_is_a_folder_and_no_command(folder: Path) -> None:
    assert (folder / RUNS / "tiny" / "model" / "model.safetensors").is_file()
    assert not list(folder.rglob("CANARY"))
    assert not Path("CANARY").exists()


def test_a_rank_that_fails_tells_no_secret(folder: Path) -> None:
    leak = folder / "leak"
    leak.mkdir()
    (leak / "sitecustomize.py").write_text(LEAK.format(names=list(IN_ENVIRONMENT)))
    done = typed(folder, "train", "tiny.yaml", "name=leaky", PYTHONPATH=str(leak))
    assert done.code == 1
    assert "401 for ***" in done.err
    run = folder / RUNS / "leaky"
    told = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {name: found for name, content in told.items() if (found := secrets_in(content))} == {}
    assert secrets_in((done.out + done.err).encode()) == []
    assert b"401 for ***" in told["rank-0.json"]
    assert b"401 for ***" in told["status.json"]
    logged = b"".join(path.read_bytes() for path in (run / "logs").rglob("*.log"))
    for words in (b"as a library says it: ***", b"UserWarning: ***", b"Exception in thread"):
        assert words in logged


def test_a_secret_on_the_command_line_is_refused_and_not_repeated(tmp_path: Path) -> None:
    """As `packhorse` runs; the other forms are tried without a process, in test_recipe_secrets.py."""
    write_tiny(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    secret = SECRETS["hugging face"]
    for words in (["train", "tiny.yaml", f"name={secret}"], ["status", secret]):
        done = packhorse(tmp_path, *words)
        assert done.code == 2
        assert "***" in done.err
        assert secret not in done.out + done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_prepared_data_that_was_changed_is_found(folder: Path) -> None:
    run = folder / RUNS / "tiny"
    facts = read_plan(run).data
    assert facts is not None
    data = Path(facts.folder)
    manifest = read_data_manifest(data)
    assert manifest is not None
    tokens = data / "train" / "tokens.bin"
    content = tokens.read_bytes()
    try:
        tokens.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        done = packhorse(folder, "verify", str(run))
        assert done.code == 1
        assert "train/tokens.bin has other content than was written (sha256)" in done.out
        tokens.write_bytes(content[:-2])
        done = packhorse(folder, "train", "tiny.yaml", "name=shorter")
        assert done.code == 2
        assert f"train/tokens.bin has {len(content) - 2:,} bytes instead of {len(content):,}" in done.err
        assert not (folder / RUNS / "shorter").exists()
    finally:
        tokens.write_bytes(content)
    assert packhorse(folder, "verify", str(run)).code == 0
