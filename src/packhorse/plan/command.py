"""What will run, word by word: argv, the worker's environment, and the DeepSpeed configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packhorse.plan.run_plan import BatchSplit, Topology
from packhorse.recipe.schema import Recipe
from packhorse.recipe.shipped import shipped_path


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
        str(script),
        str(run_folder / "plan.json"),
    )


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
    config["gradient_clipping"] = recipe.optimizer.clip_norm
    config["bf16"] = {"enabled": recipe.precision == "bf16"}
    config["fp16"] = {"enabled": False}
    return config
