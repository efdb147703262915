"""The launch command of each node without a scheduler: to type, or for another tool's script."""

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
"""Default port of torchrun."""


def launch_commands(plan: RunPlan) -> str:
    """Return the command to type on each node: with `accelerate launch`, and with torchrun."""
    topology = plan.topology
    ranks = range(topology.num_nodes)
    return "\n".join(
        [
            f"# {topology.num_nodes} nodes x {topology.processes_per_node} processes; first, on each node, with the "
            "host name of node 0:",
            f"export MASTER_ADDR=NODE_0 MASTER_PORT={DEFAULT_PORT}",
            *(f"# node {rank}\n{accelerate_line(plan, str(rank))}" for rank in ranks),
            "# or with torchrun",
            *(f"# node {rank}\n{torchrun_line(plan, str(rank))}" for rank in ranks),
        ]
    )


def accelerate_line(plan: RunPlan, node_rank: str) -> str:
    """Return the `accelerate launch` command of one node."""
    launcher, verb, *words = plan.argv
    rendezvous = ["--machine_rank", node_rank, "--main_process_ip", ADDRESS, "--main_process_port", PORT]
    return _line(launch_environment(plan.topology), [launcher, verb, *rendezvous, *words])


def torchrun_line(plan: RunPlan, node_rank: str) -> str:
    """Return the torchrun command of one node, with the variables that `accelerate launch` sets for the engine."""
    topology = plan.topology
    words = [
        *("torchrun", "--nnodes", str(topology.num_nodes), "--nproc-per-node", str(topology.processes_per_node)),
        *("--node-rank", node_rank, "--master-addr", ADDRESS, "--master-port", PORT),
        *plan.argv[-2:],
    ]
    return _line({**launch_environment(topology), **engine_environment(topology)}, words)


def engine_environment(topology: Topology) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets from the engine's config file (accelerate/utils/launch.py)."""
    text = shipped_path("accelerate_configs", f"{topology.engine}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    if config["distributed_type"] == "DEEPSPEED":
        return {"ACCELERATE_USE_DEEPSPEED": "true"}  # the worker configures DeepSpeed from the plan
    if config["distributed_type"] != "FSDP":
        return {}
    variables = {"ACCELERATE_USE_FSDP": "true"}
    for name, value in config["fsdp_config"].items():
        variables[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    if topology.shard_group is not None:
        variables["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        variables["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(topology.world_size // topology.shard_group)
        variables["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(topology.shard_group)
    return variables


def _line(environment: Mapping[str, str], words: Iterable[str]) -> str:
    """Return one bash command; only the variables of node 0's address and port are expanded."""
    quoted = [f'"{word}"' if word in (ADDRESS, PORT) else shlex.quote(word) for word in words]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), *quoted])
