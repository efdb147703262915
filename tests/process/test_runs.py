"""Runs through the command line and through a hand-typed launch: what they leave, refuse, and go on with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import PACKHORSE, curve, environment, metrics, packhorse
from packhorse.plan.run_plan import read_plan
from packhorse.recipe.shipped import shipped_path
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from packhorse.run_folder.folder import create_run
from ranks import trained
from tiny import TINY, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny recipe and one finished run of it, on 2 processes."""
    place = tmp_path_factory.mktemp("runs")
    write_tiny(
        place, checkpoint={"every_steps": 3, "keep_last": 1}, evaluation={**TINY["evaluation"], "every_steps": 2}
    )
    done = packhorse(place, "train", "tiny.yaml", "parallel.processes=2")
    assert done.code == 0, done.err
    return place


def test_a_run_leaves_what_it_says(folder: Path) -> None:
    run = folder / "runs" / "tiny"
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(7))
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "data/fill", "speed/tokens_per_second"} <= set(
        lines[1]
    )
    assert {"speed/step_seconds", "speed/data_seconds", "speed/compute_seconds", "memory/peak_bytes"} <= set(lines[1])
    assert [line["step"] for line in lines if "evaluation/loss" in line] == [0, 2, 4, 6]
    assert lines[0]["proof/isolation_difference"] <= 1e-6
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000006"]
    assert list(checkpoint_faults(run / "checkpoints" / "step-000006")) == []
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_the_result_is_read_by_transformers_and_stops_at_the_stop_token(folder: Path) -> None:
    result = folder / "runs" / "tiny" / "model"
    model = AutoModelForCausalLM.from_pretrained(result)
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_status_and_evaluate_read_the_run_folder_alone(folder: Path) -> None:
    status = packhorse(folder, "status", "runs/tiny")
    assert status.code == 0
    assert "finished" in status.out
    assert "train/loss" in status.out
    done = packhorse(folder, "evaluate", "tiny")
    assert done.code == 0, done.err
    kept = json.loads((folder / "runs" / "tiny" / "evaluation.json").read_text())
    (line,) = kept["lines"]
    assert line["tuned"]["loss"] < line["base"]["loss"] - 0.5
    assert line["tuned"]["loss"] == pytest.approx(metrics(folder / "runs" / "tiny")[-1]["evaluation/loss"], rel=1e-4)


def test_chat_answers_from_standard_input(folder: Path) -> None:
    done = subprocess.run(
        [str(PACKHORSE), "chat", "tiny"],
        cwd=folder,
        env=environment(),
        input="hello\n/exit\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "/exit" in done.stdout


def test_a_launch_typed_by_hand_is_the_same_run(folder: Path) -> None:
    plan = read_plan(folder / "runs" / "tiny")
    target = folder / "by-hand"
    again = plan.model_copy(update={"run_folder": str(target)})
    create_run(again, {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config, script = shipped_path("accelerate_configs", "ddp.yaml"), shipped_path("launch", "train.py")
    accelerate = Path(sys.executable).parent / "accelerate"
    words = [str(accelerate), "launch", "--main_process_port", str(port), "--config_file", str(config)]
    subprocess.run([*words, str(script), str(target / "plan.json")], cwd=folder, env=environment(), check=True)
    assert curve(target) == curve(folder / "runs" / "tiny")


def test_another_number_of_processes_than_planned_is_refused(folder: Path) -> None:
    plan = read_plan(folder / "runs" / "tiny")
    target = folder / "one-process"
    create_run(plan.model_copy(update={"run_folder": str(target)}), {})
    config, script = shipped_path("accelerate_configs", "ddp.yaml"), shipped_path("launch", "train.py")
    accelerate = Path(sys.executable).parent / "accelerate"
    words = [
        str(accelerate),
        "launch",
        "--num_processes",
        "1",
        "--main_process_port",
        "0",
        "--config_file",
        str(config),
    ]
    done = subprocess.run(
        [*words, str(script), str(target / "plan.json")], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "the plan is for 2 processes and 1 were started" in done.stderr
    assert not (target / "metrics.jsonl").exists()


def test_a_folder_that_holds_a_run_is_refused(folder: Path) -> None:
    before = (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    done = packhorse(folder, "train", "tiny.yaml")
    assert done.code == 2
    assert "holds a run that is finished at step 6 of 6" in done.err
    assert "name=tiny-2" in done.err
    assert (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_ends_all_ranks_and_the_run_goes_on_to_the_same_end(folder: Path) -> None:
    """Stopped in the middle and resumed: the same curve and the same weights, bit for bit, as never stopped."""
    words = ["parallel.processes=2", "steps=40", "evaluation.every_steps=null", "checkpoint.every_steps=null"]
    unbroken = trained(folder / "tiny.yaml", "unbroken", *words)
    child = subprocess.Popen(
        [str(PACKHORSE), "train", "tiny.yaml", "name=broken", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = folder / "runs" / "broken"
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 4)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=120) == 75
    assert ranks_of(run) == []
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 4 <= status["step"] < 40
    done = packhorse(folder, "train", "runs/broken", "--resume")
    assert done.code == 0, done.err
    assert [line["step"] for line in metrics(run)] == list(range(41))
    assert curve(run) == curve(unbroken)
    one, other = (load_file(each / "model" / "model.safetensors") for each in (run, unbroken))
    assert all((one[key] == other[key]).all() for key in other)
    again = packhorse(folder, "train", "runs/broken", "--resume")
    assert again.code == 2
    assert "is finished" in again.err


def test_a_second_ctrl_c_ends_all_ranks_at_once(folder: Path) -> None:
    words = ["name=impatient", "parallel.processes=2", "steps=2000", "evaluation.every_steps=null"]
    child = subprocess.Popen(
        [str(PACKHORSE), "train", "tiny.yaml", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = folder / "runs" / "impatient"
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 4)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # a rank that hangs: it will not stop when it is asked to
    child.send_signal(signal.SIGINT)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=120) == 75
    assert ranks_of(run) == []
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def ranks_of(run: Path) -> list[int]:
    """Processes whose command line names this run's plan and the launched script itself."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(run / "plan.json") in words and b"launch" not in words:
            found.append(int(process.name))
    return found


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_trains_on_a_finished_run_beside_old_rows(kind: str, folder: Path) -> None:
    recipe = folder / f"{kind}.yaml"
    tiny = {**TINY, "name": kind, "model": {"path": "runs/tiny"}, "method": {"kind": kind, "rank": 4, "alpha": 8}}
    retain = [{"path": "builtin:core.messages.jsonl", "replay_rows": 100}]
    tiny |= {"data": {"sources": [{"path": "builtin:tickets.messages.jsonl"}], "retain": retain}, "steps": 15}
    recipe.write_text(json.dumps(tiny))
    run = trained(recipe, kind, f"model.path={folder}/runs/tiny", "evaluation.every_steps=5", "track.every_steps=7")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert weights
    assert all(tensor.numel() for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    counts = metrics(run)[0]
    assert 0 < counts["model/num_trainable"] < counts["model/num_parameters"]
    assert [line["step"] for line in metrics(run)] == [0, 5, 7, 10, 14, 15]
    assert metrics(run)[-1]["evaluation/loss"] < metrics(run)[0]["evaluation/loss"] - 0.1
    assert packhorse(folder, "evaluate", kind).code == 0
    lines = json.loads((run / "evaluation.json").read_text())["lines"]
    assert {line["set"] for line in lines} == {"validation", "retain"}
