"""The launch: command line, environment of the worker, and DeepSpeed configuration."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import list_parameters, read_shape
from packhorse.plan.run_plan import BatchSplit, RunPlan, Topology
from packhorse.recipe.locate import path_of
from packhorse.recipe.schema import Recipe
from packhorse.recipe.shipped import shipped_path
from packhorse.run_folder.layout import PLAN_FILE

ALIGNMENT = 2**16
# Elements; models tried on a CPU are small, and five buffers of the shipped size need much memory.
TRIAL_BUFFER = 2**22


def launch_argv(topology: Topology, folder: Path, script: str = "train.py") -> tuple[str, ...]:
    """Return the command line as a list of words, which no shell ever parses.

    Args:
        topology: Placement of the processes.
        folder: Folder with plan.json.
        script: Script of the folder `launch` that each process runs.
    """
    options: dict[str, object] = {
        "--config_file": shipped_path("accelerate_configs", f"{topology.engine}.yaml"),
        "--num_processes": topology.world_size,
        "--num_machines": topology.num_nodes,
    }
    if topology.shard_group is not None:
        # hsdp: these override the file.
        options["--parallelism_config_dp_replicate_size"] = topology.world_size // topology.shard_group
        options["--parallelism_config_dp_shard_size"] = topology.shard_group
    words = [str(word) for option in options.items() for word in option]
    return ("accelerate", "launch", *words, str(shipped_path("launch", script)), str(folder / PLAN_FILE))


def job_argv(plan: RunPlan) -> tuple[str, ...]:
    """Return the command that submits an existing run folder to Slurm; empty on one node, where a launch is enough."""
    topology = plan.topology
    if topology.num_nodes == 1:
        return ()
    nodes, gpus = f"--nodes={topology.num_nodes}", f"--gpus-per-node={topology.processes_per_node}"
    return ("sbatch", nodes, gpus, str(shipped_path("slurm", "job.sbatch")), plan.run_folder)


def launch_files(plan: RunPlan) -> tuple[str, ...]:
    """Return the files that the launch reads: configuration of accelerate, script of the worker, plan."""
    return (plan.argv[plan.argv.index("--config_file") + 1], *plan.argv[-2:])


def worker_env(recipe: Recipe, topology: Topology) -> dict[str, str]:
    """Return the variables that the worker sets before it imports torch, so that a manual launch gives the same run."""
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if topology.device == "cpu":
        env["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # With ACCELERATE_USE_CPU, Accelerate would silently use DDP instead of DeepSpeed.
        env["DS_ACCELERATOR"] = "cpu"
    else:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        if recipe.deterministic:
            # torch refuses cuBLAS without it, which otherwise may split a product differently from call to call.
            env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return env


def set_worker_env(plan_file: Path) -> None:
    """Set the plan's variables in this process, before it imports torch, which reads some of them."""
    planned = json.loads(plan_file.read_text(encoding="utf-8"))["env"]
    if "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        # The user has set the allocator; of two names torch would read the plan's older one first.
        planned.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    os.environ.update(planned)


def deepspeed_config(recipe: Recipe, topology: Topology, batch: BatchSplit) -> dict[str, Any] | None:
    """Return the shipped DeepSpeed JSON of the engine, completed from recipe and batch split; None for other engines.

    Clipping is set here because DeepSpeed clips inside its step. A flattened micro-batch is one row.
    """
    if not topology.engine.startswith("zero"):
        return None
    shipped = shipped_path("accelerate_configs", f"{topology.engine}.json")
    config: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = batch.accumulation_steps
    # 0: no clipping; DeepSpeed still computes the norm.
    config["gradient_clipping"] = recipe.optimizer.clip_norm or 0.0
    config["bf16"] = {"enabled": recipe.precision == "bf16"}
    # DeepSpeed adapts the loss scale automatically, starting at 2^16.
    config["fp16"] = {"enabled": recipe.precision == "fp16"}
    if recipe.precision == "bf16" and config["zero_optimization"]["stage"] > 1:
        # By default DeepSpeed sums the gradients of the passes in bf16, whose eight bits are too few for many passes.
        # Under stage 1 this setting would select another optimizer wrapper of DeepSpeed.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if topology.device == "cpu" and config["zero_optimization"]["stage"] == 3:
        # By default the small weights of a trial would stay whole on every rank, and the trial would shard nothing.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if topology.engine == "zero3_nvme":
        _complete_nvme(config["zero_optimization"], recipe, topology)
    return config


def nvme_folder(plan: RunPlan) -> Path | None:
    """Return the folder on this machine for the files of `zero3_nvme`; None under other engines.

    Raises:
        UserError: `parallel.nvme` names an environment variable that is not set here.
    """
    if plan.topology.engine != "zero3_nvme":
        return None
    assert plan.deepspeed is not None
    return path_of(plan.deepspeed["zero_optimization"]["offload_param"]["nvme_path"])


def with_local_nvme(plan: RunPlan) -> RunPlan:
    """Return the plan with the local folder of `zero3_nvme`; the written plan may contain `${env:SLURM_TMPDIR}`."""
    folder = nvme_folder(plan)
    if folder is None:
        return plan
    config = copy.deepcopy(plan.deepspeed)
    assert config is not None
    for part in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][part]["nvme_path"] = str(folder)
    return plan.model_copy(update={"deepspeed": config})


def _complete_nvme(zero: dict[str, Any], recipe: Recipe, topology: Topology) -> None:
    """Set the folder of ZeRO-Infinity's files and the largest part of one weight on a rank."""
    for part in ("offload_optimizer", "offload_param"):
        # DeepSpeed deletes the contents of this folder at the start, so two runs must not share it.
        zero[part]["nvme_path"] = f"{recipe.parallel.nvme}/packhorse-{recipe.name}"
    shape = read_shape(find_configuration(recipe))
    if shape is not None:
        largest = max(parameter.size for parameter in list_parameters(shape))
        # One buffer must hold a rank's part of the largest weight, plus alignment.
        zero["offload_param"]["buffer_size"] = -(-largest // topology.world_size) + ALIGNMENT
    elif topology.device == "cpu":
        zero["offload_param"]["buffer_size"] = TRIAL_BUFFER
