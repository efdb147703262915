"""What will run, word by word: argv, the worker's environment, and the DeepSpeed configuration."""

from __future__ import annotations

import copy
import json
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
# Elements; what is tried on a CPU is small, and five buffers of the shipped size are not.
TRIAL_BUFFER = 2**22


def launch_argv(topology: Topology, run_folder: Path) -> tuple[str, ...]:
    """The launch as a list of words; `shlex.join` shows it, no shell ever reads it."""
    config = shipped_path("accelerate_configs", f"{topology.engine}.yaml")
    script = shipped_path("launch", "train.py")
    return (
        "accelerate",
        "launch",
        "--config_file",
        str(config),
        "--num_processes",
        str(topology.world_size),
        "--num_machines",
        str(topology.num_nodes),
        *_mesh_words(topology),
        str(script),
        str(run_folder / PLAN_FILE),
    )


def _mesh_words(topology: Topology) -> tuple[str, ...]:
    """Accelerate's words for hsdp, in place of those in its file."""
    if topology.shard_group is None:
        return ()
    return (
        "--parallelism_config_dp_replicate_size",
        str(topology.world_size // topology.shard_group),
        "--parallelism_config_dp_shard_size",
        str(topology.shard_group),
    )


def job_argv(plan: RunPlan) -> tuple[str, ...]:
    """What hands the run to Slurm once its folder is made; nothing where one launch is enough: on one node."""
    topology = plan.topology
    if topology.num_nodes == 1:
        return ()
    nodes, gpus = f"--nodes={topology.num_nodes}", f"--gpus-per-node={topology.processes_per_node}"
    return ("sbatch", nodes, gpus, str(shipped_path("slurm", "job.sbatch")), plan.run_folder)


def launch_files(plan: RunPlan) -> tuple[str, ...]:
    """The files that the launch reads: accelerate's configuration, the worker's script, the plan."""
    return (plan.argv[plan.argv.index("--config_file") + 1], *plan.argv[-2:])


def worker_env(topology: Topology) -> dict[str, str]:
    """Variables that the worker sets before it imports torch, so that a launch typed by hand is the same."""
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if topology.device == "cpu":
        env["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # ACCELERATE_USE_CPU would make Accelerate take DDP instead of DeepSpeed without a word.
        env["DS_ACCELERATOR"] = "cpu"
    else:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return env


def deepspeed_config(recipe: Recipe, topology: Topology, batch: BatchSplit) -> dict[str, Any] | None:
    """The engine's shipped DeepSpeed JSON, completed with what the recipe and the batch split say.

    Clipping stands here because DeepSpeed clips inside its own step; a flattened micro-batch is one row.
    """
    if not topology.engine.startswith("zero"):
        return None
    shipped = shipped_path("accelerate_configs", f"{topology.engine}.json")
    config: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = batch.accumulation_steps
    # 0: not clipped; the norm is computed all the same.
    config["gradient_clipping"] = recipe.optimizer.clip_norm or 0.0
    config["bf16"] = {"enabled": recipe.precision == "bf16"}
    # DeepSpeed scales the loss by itself, from 2^16 down and up again.
    config["fp16"] = {"enabled": recipe.precision == "fp16"}
    if recipe.precision == "bf16" and config["zero_optimization"]["stage"] > 1:
        # By default it adds up passes in bf16, whose eight bits lose what a sum of many passes still gains. Under
        # stage 1 the same words would choose another optimizer wrapper of DeepSpeed's.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if topology.device == "cpu" and config["zero_optimization"]["stage"] == 3:
        # A trial: by default weights this small would stay whole on every rank, and nothing would be tried.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if topology.engine == "zero3_nvme":
        _complete_nvme(config["zero_optimization"], recipe, topology)
    return config


def nvme_folder(plan: RunPlan) -> Path | None:
    """Where this machine keeps what `zero3_nvme` offloads; None under other engines.

    Raises:
        UserError: `parallel.nvme` names an environment variable that is not set here.
    """
    if plan.topology.engine != "zero3_nvme":
        return None
    assert plan.deepspeed is not None
    return path_of(plan.deepspeed["zero_optimization"]["offload_param"]["nvme_path"])


def on_this_machine(plan: RunPlan) -> RunPlan:
    """The plan with the folder of `zero3_nvme` as this machine has it: a plan may name `${env:SLURM_TMPDIR}`."""
    folder = nvme_folder(plan)
    if folder is None:
        return plan
    config = copy.deepcopy(plan.deepspeed)
    assert config is not None
    for part in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][part]["nvme_path"] = str(folder)
    return plan.model_copy(update={"deepspeed": config})


def _complete_nvme(zero: dict[str, Any], recipe: Recipe, topology: Topology) -> None:
    """Where ZeRO-Infinity keeps its files, and how large a rank's part of one weight may be."""
    for part in ("offload_optimizer", "offload_param"):
        # DeepSpeed empties what it finds below this at the start: two runs must not share it.
        zero[part]["nvme_path"] = f"{recipe.parallel.nvme}/packhorse-{recipe.name}"
    shape = read_shape(find_configuration(recipe))
    if shape is not None:
        largest = max(parameter.size for parameter in list_parameters(shape))
        # As many elements as a rank's part of the largest weight, which must fit one buffer, and what alignment adds.
        zero["offload_param"]["buffer_size"] = -(-largest // topology.world_size) + ALIGNMENT
    elif topology.device == "cpu":
        zero["offload_param"]["buffer_size"] = TRIAL_BUFFER
