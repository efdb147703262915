"""The launch of each node where no scheduler starts it: lines to be typed, or put into another tool's script."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Final

import yaml

from packhorse.launching.local.environment import launch_environment
from packhorse.plan.run_plan import RunPlan, Topology
from packhorse.recipe.shipped import shipped_path

ADDRESS: Final = "$MASTER_ADDR"
PORT: Final = "$MASTER_PORT"
DEFAULT_PORT: Final = 29500
"""torchrun's own."""


def lines_of_nodes(plan: RunPlan) -> str:
    """What to type on each node: `accelerate launch`, and the same with torchrun."""
    topology = plan.topology
    ranks = range(topology.num_nodes)
    return "\n".join(
        [
            f"# {topology.num_nodes} nodes x {topology.processes_per_node} processes; on each node first, with the "
            "name of node 0:",
            f"export MASTER_ADDR=NODE_0 MASTER_PORT={DEFAULT_PORT}",
            *(f"# node {rank}\n{accelerate_line(plan, str(rank))}" for rank in ranks),
            "# the same with torchrun",
            *(f"# node {rank}\n{torchrun_line(plan, str(rank))}" for rank in ranks),
        ]
    )


def accelerate_line(plan: RunPlan, node_rank: str) -> str:
    """`accelerate launch` of one node.

    Args:
        plan: What runs.
        node_rank: Number of the node.
    """
    launcher, verb, *words = plan.argv
    meet = ["--machine_rank", node_rank, "--main_process_ip", ADDRESS, "--main_process_port", PORT]
    return _line(launch_environment(plan.topology), [launcher, verb, *meet, *words])


def torchrun_line(plan: RunPlan, node_rank: str) -> str:
    """torchrun of one node, with the variables that `accelerate launch` would set for the engine."""
    topology = plan.topology
    words = [
        *("torchrun", "--nnodes", str(topology.num_nodes), "--nproc-per-node", str(topology.processes_per_node)),
        *("--node-rank", node_rank, "--master-addr", ADDRESS, "--master-port", PORT),
        *plan.argv[-2:],
    ]
    return _line({**launch_environment(topology), **engine_environment(topology)}, words)


def engine_environment(topology: Topology) -> dict[str, str]:
    """Variables by which `accelerate launch` hands the engine's shipped file on (accelerate/utils/launch.py)."""
    text = shipped_path("accelerate_configs", f"{topology.engine}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    if config["distributed_type"] == "DEEPSPEED":
        return {"ACCELERATE_USE_DEEPSPEED": "true"}  # the plan's own configuration holds the rest
    if config["distributed_type"] != "FSDP":
        return {}
    found = {"ACCELERATE_USE_FSDP": "true"}
    for name, value in config["fsdp_config"].items():
        found[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    if topology.shard_group is not None:
        found["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        found["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(topology.world_size // topology.shard_group)
        found["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(topology.shard_group)
    return found


def _line(environment: Mapping[str, str], words: Iterable[str]) -> str:
    """As bash reads it back; of variables only the two that say where the nodes meet are expanded."""
    quoted = [f'"{word}"' if word in (ADDRESS, PORT) else shlex.quote(word) for word in words]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), *quoted])
