"""`packhorse prepare` as processes: killed in the middle, and two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli import PACKHORSE, environment

NUM_ROWS = 20_000


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(NUM_ROWS):
            file.write(json.dumps({"prompt": f"what is {number} and one", "completion": str(number + 1)}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: killed\n"
        "model: {config: {model_type: llama}, tokenizer: 'builtin:tokenizer'}\n"
        "method: full\n"
        f"data: {{sources: [{{path: {rows}}}]}}\n"
        f"runs_folder: {tmp_path / 'runs'}\n"
        "optimizer: {learning_rate: 1e-3}\n"
        "steps: 1\n"
    )
    return path


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(PACKHORSE), "prepare", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def test_killed_in_the_middle_and_run_again(recipe: Path) -> None:
    data = recipe.parent / "runs" / ".data"
    process = start(recipe)
    deadline = time.monotonic() + 180
    while not list(data.glob("*.draft-*/spool/tokens.bin")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(data.glob("*.draft-*"))
    assert list(data.glob("*/data.json")) == []
    assert "prepared" in finish(start(recipe))
    assert list(data.glob("*.draft-*")) == []
    (manifest,) = data.glob("*/data.json")
    ledger = json.loads(manifest.read_text())["ledger"]
    assert ledger["rows_in"]["rows"] == NUM_ROWS == sum(side["rows"] for side in ledger["kept"].values())


def test_two_at_once_do_the_work_once(recipe: Path) -> None:
    processes = [start(recipe), start(recipe)]
    said = [finish(process).split()[0] for process in processes]
    assert sorted(said) == ["found", "prepared"]
    assert len(list((recipe.parent / "runs" / ".data").glob("*/data.json"))) == 1
