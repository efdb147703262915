"""The shipped configurations as accelerate reads them, and the options that the plan adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from packhorse.plan.command import launch_argv
from packhorse.plan.run_plan import Topology
from packhorse.recipe.schema import Engine
from packhorse.recipe.shipped import shipped_path


def read(*words: str) -> Any:
    """What `accelerate launch WORDS` makes of files and flags."""
    return _validate_launch_command(launch_command_parser().parse_args(list(words)))[0]


@pytest.mark.parametrize("engine", get_args(Engine))
def test_each_engine_has_a_file_that_accelerate_reads_alone(engine: str) -> None:
    args = read("--config_file", str(shipped_path("accelerate_configs", f"{engine}.yaml")), "script.py")
    started = {"deepspeed": args.use_deepspeed, "fsdp": args.use_fsdp, "ddp": args.multi_gpu}
    family = "deepspeed" if engine.startswith("zero") else "fsdp" if engine in ("fsdp2", "hsdp") else engine
    assert [name for name, does in started.items() if does] == ([family] if engine != "single" else [])
    if family == "fsdp":
        assert int(args.fsdp_version) == 2
    assert args.use_parallelism_config == (engine == "hsdp")


def test_the_plans_groups_win_over_those_of_the_file() -> None:
    topology = Topology(
        device="cuda", engine="hsdp", num_nodes=2, processes_per_node=8, threads_per_process=8, shard_group=4
    )
    args = read(*launch_argv(topology, Path("runs/r"))[2:])
    assert (args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size) == (4, 4)
    assert (args.num_processes, args.num_machines) == (16, 2)


@pytest.mark.parametrize(
    ("engine", "stage", "offload"),
    [
        ("zero1", 1, "none"),
        ("zero2", 2, "none"),
        ("zero3", 3, "none"),
        ("zero3_offload", 3, "cpu"),
        ("zero3_nvme", 3, "nvme"),
    ],
)
def test_deepspeeds_file_is_of_its_stage(engine: str, stage: int, offload: str) -> None:
    config = json.loads(shipped_path("accelerate_configs", f"{engine}.json").read_text(encoding="utf-8"))
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    for part in ("offload_optimizer", "offload_param"):
        assert zero.get(part, {"device": "none"})["device"] == offload
    # Else accelerate puts DeepSpeed's own Adam, which is compiled for minutes, in the place of the recipe's optimizer.
    assert config["zero_force_ds_cpu_optimizer"] is False
