"""The launch of a node without a scheduler: commands, their environment, and a container's first process."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.launching.places.node_commands import ADDRESS, engine_environment, launch_commands
from packhorse.launching.places.start import launch_of_node
from packhorse.launching.places.task_files import dns_name
from packhorse.plan.command import launch_argv
from packhorse.plan.run_plan import RunPlan, Topology
from packhorse.run_folder.folder import open_run
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is planned for two processes."""
    folder = tmp_path_factory.mktemp("places")
    write_tiny(folder)
    with contextlib.chdir(folder):
        assert main(["plan", "tiny.yaml", "parallel.processes=2", "--write"]) == 0
    return folder


@pytest.fixture
def plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunPlan:
    monkeypatch.chdir(folder)
    return open_run("runs/tiny")


def two_nodes(engine: str) -> Topology:
    group = 2 if engine == "hsdp" else None
    return Topology(
        device="cuda", engine=engine, num_nodes=2, processes_per_node=2, threads_per_process=8, shard_group=group
    )


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp"])
def test_torchrun_has_the_variables_of_accelerate(engine: str) -> None:
    topology = two_nodes(engine)
    words = list(launch_argv(topology, Path("/run")))[2:]
    arguments = launch_command_parser().parse_args([*words[:-2], "--machine_rank", "1", words[-2]])
    arguments.main_process_ip, arguments.main_process_port = "first", 29500
    arguments, _, _ = _validate_launch_command(arguments)
    if engine.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ""
        theirs = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        theirs = prepare_multi_gpu_env(arguments)
    ours = engine_environment(topology)
    assert {name: theirs[name] for name in ours} == ours
    # Every kind that accelerate sets is among them.
    kinds = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")
    assert {kind for kind in kinds if theirs.get(kind) == "true"} == set(kinds) & set(ours)


def test_each_node_has_a_command_that_bash_parses(plan: RunPlan, tmp_path: Path) -> None:
    hostile = str(tmp_path / "a $(touch canary) 'b'" / "plan.json")
    two = plan.model_copy(update={"topology": two_nodes("fsdp2"), "argv": (*plan.argv[:-1], hostile)})
    text = launch_commands(two)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    lines = [line for line in text.splitlines() if not line.startswith(("#", "export "))]
    assert len(lines) == 4
    for line in lines:
        out = subprocess.run(
            ["bash", "-c", f"MASTER_ADDR=first MASTER_PORT=29500; set -- {line}; printf '%s\\n' \"$@\""],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        ).stdout.splitlines()
        assert hostile in out
        assert "first" in out
        assert "29500" in out
    assert not (tmp_path / "canary").exists()
    assert [line.split("--machine_rank ")[1][0] for line in lines[:2]] == ["0", "1"]
    assert ADDRESS in shlex.split(lines[2])


def test_plan_prints_the_commands(plan: RunPlan, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["plan", "tiny.yaml", "name=other", "--gpus", "4", "--nodes", "2", "--argv"]) == 0
    text = capsys.readouterr().out
    assert text.count("accelerate launch --machine_rank") == 2
    assert text.count("torchrun --nnodes 2 --nproc-per-node 2 --node-rank") == 2


def test_dns_name(plan: RunPlan) -> None:
    def named(name: str) -> str:
        return dns_name(plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"name": name})}))

    assert named("Llama3.1_8B-lora") == "llama3-1-8b-lora"
    assert named("70b") == "run-70b"
    assert len(named("x" * 120)) == 50


def test_a_pod_starts_its_ranks(plan: RunPlan) -> None:
    pod = {"RANK": "1", "WORLD_SIZE": "2", "PET_NNODES": "2", "HF_HUB_OFFLINE": "1", "PATH": "/bin"}
    words, environment = launch_of_node("runs/tiny", "0", "first.default.svc", "23456", pod)
    assert words[:8] == [
        "accelerate", "launch", "--machine_rank", "0", "--main_process_ip", "first.default.svc",
        "--main_process_port", "23456",
    ]  # fmt: skip
    assert words[-1] == str(Path("runs/tiny").absolute() / "plan.json")
    assert {"RANK", "WORLD_SIZE", "PET_NNODES"}.isdisjoint(environment)
    assert environment["PET_SIGNALS_TO_HANDLE"] == "SIGINT"
    with pytest.raises(UserError, match="this is node 1, and the plan of runs/tiny has nodes 0 to 0"):
        launch_of_node("runs/tiny", "1", "first", "1", pod)
