"""`packhorse plan` with a card, and the same check before a run: on made-up GPUs that nvidia-smi names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packhorse.cli.main import main
from packhorse.errors import EXIT_OK, EXIT_USER_ERROR
from packhorse.plan.run_plan import read_plan
from packhorse.plan.topology import host_memory
from tiny import TINY, write_tiny

CONFIG = TINY["model"]["config"]
HUGE = CONFIG | {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def write_huge(folder: Path, **sections: Any) -> None:
    """A model of 68 billion weights, all trained: far more than any one card holds."""
    write_tiny(folder, **{"model": TINY["model"] | {"config": HUGE}, "precision": "bf16", **sections})


def told(words: list[str], capsys: pytest.CaptureFixture[str], code: int = EXIT_OK) -> str:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert err == "" or code != EXIT_OK
    return out if code == EXIT_OK else err


def test_json_says_all_that_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "llama3.1-8b/lora",
        "--gpus",
        "16xH100-80GB",
        "--nodes",
        "2",
        "--price",
        "2.5",
        "--json",
        "steps=100",
    ]
    value = json.loads(told(words, capsys))
    memory, time = value["memory"], value["time"]
    assert value["topology"]["num_nodes"] == 2
    peak = sum(memory["phases"][memory["peak"]].values())
    assert memory["required_bytes"] == peak + sum(memory["outside"].values())
    assert all(sum(parts.values()) <= peak for parts in memory["phases"].values())
    assert memory["fits"] is True
    assert memory["margin"] == pytest.approx(1 - memory["required_bytes"] / memory["card_bytes"])
    assert sum(time["parts"].values()) == pytest.approx(time["step_seconds"])
    assert time["hours"] == pytest.approx(100 * time["step_seconds"] / 3600)
    assert time["price"] == pytest.approx(time["hours"] * 16 * 2.5)
    assert value["changes"] == []
    assert value["argv"][:2] == ["accelerate", "launch"]
    assert value["job"][:3] == ["sbatch", "--nodes=2", "--gpus-per-node=8"]
    assert all(Path(file).is_file() for file in [*value["files"][:2], value["job"][3]])
    assert value["files"][2] == value["argv"][-1] == f"{value['job'][4]}/plan.json"
    assert list(here.iterdir()) == []


def test_a_slower_network_slows_a_run_over_nodes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "llama3.1-8b/full", "--gpus", "16xH100", "--nodes", "2", "--json"]
    seconds = [json.loads(told([*words, "--network", n], capsys))["time"]["step_seconds"] for n in ("400", "10")]
    assert seconds[1] > 1.3 * seconds[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "8xH101"], ["no GPU is called 'H101'", "H100-80GB"]),
        (["--gpus", "0xH100"], ["--gpus is '0xH100'"]),
        (["--gpus", "auto", "--nodes", "2"], ["--nodes is 2, and --gpus is auto", "leave --nodes out"]),
        (["--gpus", "autoxH101"], ["no GPU is called 'H101'"]),
        (["--gpus", "8", "--compare"], ["which GPU is not known", "--gpus 8xH100-80GB"]),
        (["--gpus", "8xH100", "--price", "much"], ["--price is much", "--price 2.50"]),
        (["--gpus", "8xH100", "--network", "-1"], ["--network is -1"]),
        (["--gpus", "72xH100"], ["batch.packs is 64, and there are 72 processes", "set batch.packs to 72"]),
        (["--gpus", "8xH100", "--compair"], ["--compair", "--compare"]),
        (["--gpus", "8xH100", "--diff", "runs/none"], ["runs/none contains no plan.json"]),
    ],
    ids=" ".join,
)
def test_bad_words_are_refused(
    words: list[str], says: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = told(["plan", "llama3.1-8b/lora", *words], capsys, EXIT_USER_ERROR)
    for word in says:
        assert word in error


def test_a_model_without_config_says_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here, model={"id": "nobody/nothing", "tokenizer": "builtin:tokenizer"})
    said = told(["plan", "tiny.yaml", "--gpus", "1xH100"], capsys)
    assert "not known: nobody/nothing has no config.json on this machine" in " ".join(said.split())
    error = told(["plan", "tiny.yaml", "--gpus", "1xH100", "--compare"], capsys, EXIT_USER_ERROR)
    assert "has no config.json" in error


def test_the_launch_line_alone_is_the_plans(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here)
    (line,) = told(["plan", "tiny.yaml", "--argv"], capsys).splitlines()
    assert line.startswith("accelerate launch --config_file ")
    assert line.endswith("runs/tiny/plan.json")


def test_the_verdict_comes_first_and_lines_of_a_pipe_are_whole(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "llama3.3-70b/qlora", "--gpus", "8xH100-80GB", "--price", "2.50", "steps=500"]
    folded = told(words, capsys)
    monkeypatch.delenv("COLUMNS")
    lines = told(words, capsys).splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["memory", "run time", "cost"]
    assert lines[0].partition("  ")[2].strip().startswith("fits: ")
    (command,) = (line for line in lines if line.startswith("command "))
    assert command.endswith("plan.json")
    assert len(command) > 120 > max(map(len, folded.splitlines())) - 1
    assert not any("…" in line or line != line.rstrip() for line in lines)
    assert len(lines) < len(folded.splitlines())


def test_what_would_run_is_shown_word_by_word(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is folded
    words = ["plan", "llama3.1-8b/full", "parallel.engine=fsdp2", "--gpus"]
    two = told([*words, "16xH100", "--nodes", "2"], capsys)
    for word in ("accelerate launch", "fsdp2.yaml", "launch/train.py", "plan.json", "TOKENIZERS_PARALLELISM=false"):
        assert word in two
    assert "sbatch --nodes=2 --gpus-per-node=8" in two
    one = told([*words, "8xH100", "parallel.engine=zero2"], capsys)
    assert "sbatch" not in one
    assert "the DeepSpeed configuration is in plan.json" in one
    assert "DeepSpeed configuration" not in two


def test_this_machines_card_is_taken(
    here: Path, write_nvidia_smi: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_nvidia_smi("echo 'NVIDIA A10'\n" * 2)
    write_huge(here, model=TINY["model"] | {"config": HUGE | {"num_hidden_layers": 8}})
    value = json.loads(told(["plan", "tiny.yaml", "--json", "parallel.processes=2"], capsys))
    assert value["gpu"] == "A10-24GB"
    assert value["memory"]["fits"] is False
    assert value["changes"], "more of these GPUs would hold it"
    assert value["host_bytes"] == host_memory(), "the host is this machine's too"
    other = json.loads(told(["plan", "tiny.yaml", "--gpus", "2xH100-80GB", "--json"], capsys))
    assert other["host_bytes"] is None


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(
    here: Path, write_nvidia_smi: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the rows are read: there are none."""
    write_nvidia_smi("echo 'NVIDIA A10'")
    write_huge(here, data={"sources": [{"path": "missing.jsonl"}]})
    error = told(["train", "tiny.yaml"], capsys, EXIT_USER_ERROR)
    assert "on each GPU, and A10-24GB has 22.5 GiB" in error
    assert "--force" in error
    assert not (here / "runs").exists()
    forced = told(["train", "tiny.yaml", "--force"], capsys, EXIT_USER_ERROR)
    assert "missing.jsonl" in forced


def test_a_written_plan_keeps_what_was_predicted_and_may_be_forced(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What every layer keeps of 65,536 tokens; the weights are few, for the disk's sake.
    deep = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32}
    batch = {"length": 2048, "packs": 32, "micro": 32}
    write_tiny(here, model=TINY["model"] | {"config": deep}, precision="bf16", batch=batch)
    words = ["plan", "tiny.yaml", "--gpus", "1xA10", "--write"]
    assert "22.5 GiB" in told(words, capsys, EXIT_USER_ERROR)
    assert not (here / "runs" / "tiny").exists()
    told([*words, "--force"], capsys)
    predicted = read_plan(here / "runs" / "tiny").predicted
    assert predicted is not None
    assert predicted.gpu == "A10-24GB"
    assert predicted.required_bytes > predicted.memory_bytes


def test_a_plan_is_compared_with_a_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here)
    told(["plan", "tiny.yaml", "--write"], capsys)
    assert "the plans are the same" in told(["plan", "tiny.yaml", "--diff", "runs/tiny"], capsys)
    changed = told(["plan", "tiny.yaml", "--diff", "runs/tiny", "steps=9", "--json"], capsys)
    found = {each["field"]: (each["run"], each["plan"]) for each in json.loads(changed)}
    assert found == {"steps": (6, 9), "num_steps": (6, 9)}


def test_a_runs_measured_steps_correct_the_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here, precision="bf16")
    words = ["plan", "tiny.yaml", "--gpus", "1xA10"]
    told([*words, "--write"], capsys)
    plain = json.loads(told([*words, "--json"], capsys))["time"]
    figures = [
        {"step": n, "speed/step_seconds": 3 * plain["step_seconds"] + 1, "speed/other_seconds": 1} for n in range(4)
    ]
    lines = "".join(f"{json.dumps(line)}\n" for line in figures)
    assert "has fewer than two measured steps" in told([*words, "--calibrate", "runs/tiny"], capsys, EXIT_USER_ERROR)
    (here / "runs" / "tiny" / "metrics.jsonl").write_text(lines, encoding="utf-8")
    corrected = json.loads(told([*words, "--json", "--calibrate", "runs/tiny", "steps=60"], capsys))["time"]
    assert corrected["step_seconds"] == pytest.approx(3 * plain["step_seconds"])
    assert corrected["measured_over_predicted"] == pytest.approx(3)
    assert "runs/tiny" in corrected["uncertainty_reason"]
