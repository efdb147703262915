"""From what the recipe and the command line ask for to which processes run where."""

from __future__ import annotations

from dataclasses import dataclass

from packhorse.errors import UserError
from packhorse.plan.hardware import Hardware
from packhorse.plan.run_plan import Decision, Topology
from packhorse.recipe.schema import ParallelSection

GPUS_PER_NODE = 8
THREADS_PER_GPU = 8


@dataclass(frozen=True)
class Ask:
    """What the command line asks for.

    Attributes:
        gpus: GPUs in all (`--gpus`), None to take what the recipe or the machine says.
        nodes: Machines that share them (`--nodes`).
    """

    gpus: int | None = None
    nodes: int | None = None


def choose_topology(parallel: ParallelSection, ask: Ask, here: Hardware) -> tuple[Topology, Decision]:
    """Places processes on devices; says why.

    Raises:
        UserError: The GPUs asked for cannot be shared equally over the nodes.
    """
    if ask.gpus is not None:
        return _asked_gpus(parallel, ask.gpus, ask.nodes)
    if ask.nodes is not None:
        raise UserError(
            f"--nodes is {ask.nodes} and --gpus is not given.",
            "GPUs are shared out over the nodes; without them the number of nodes would be ignored.",
            f"give both, for example --gpus {8 * ask.nodes} --nodes {ask.nodes}.",
        )
    wanted = parallel.processes
    available = len(here.gpus) if here.gpus else here.num_cores
    if wanted == "auto":
        count = len(here.gpus) or 1
        reason = f"this machine has {len(here.gpus)} GPUs" + ("" if here.gpus else f" and {here.num_cores} CPU cores")
    else:
        count, reason = wanted, "parallel.processes of the recipe"
    topology = Topology(
        device=here.device,
        engine=parallel.engine,
        num_nodes=1,
        processes_per_node=count,
        threads_per_process=max(1, here.num_cores // count),
    )
    where = "GPUs" if here.gpus else "CPU cores"
    return topology, Decision(name="processes", value=str(count), reason=f"{reason} ({available} {where} here)")


def _asked_gpus(parallel: ParallelSection, gpus: int, nodes: int | None) -> tuple[Topology, Decision]:
    if gpus < 1 or (nodes is not None and nodes < 1):
        raise UserError(
            f"--gpus is {gpus} and --nodes is {nodes if nodes is not None else 1}.",
            "a run needs at least one GPU on at least one node.",
            "give counts of 1 or more, for example --gpus 8 --nodes 1.",
        )
    num_nodes = nodes or max(1, -(-gpus // GPUS_PER_NODE))
    if gpus % num_nodes:
        raise UserError(
            f"--gpus is {gpus}, which {num_nodes} nodes cannot share equally.",
            "each node runs the same number of processes.",
            f"set --gpus to {gpus - gpus % num_nodes or num_nodes} or {gpus + num_nodes - gpus % num_nodes}.",
        )
    topology = Topology(
        device="cuda",
        engine=parallel.engine,
        num_nodes=num_nodes,
        processes_per_node=gpus // num_nodes,
        threads_per_process=THREADS_PER_GPU,
    )
    return topology, Decision(
        name="processes",
        value=str(gpus),
        reason=f"--gpus {gpus}: {gpus // num_nodes} GPUs on each of {num_nodes} nodes, a process a GPU",
    )


def check_machine(topology: Topology, here: Hardware) -> None:
    """Refuses a run that this machine has no devices for.

    Raises:
        UserError: More processes than GPUs, or than CPU cores where there is no GPU.
    """
    available = len(here.gpus) if topology.device == "cuda" else here.num_cores
    unit = "GPUs" if topology.device == "cuda" else "CPU cores"
    if topology.processes_per_node > available or topology.num_nodes > 1:
        asked = f"{topology.world_size} processes" + (f" on {topology.num_nodes} nodes" * (topology.num_nodes > 1))
        here_at_most = f"set parallel.processes to {available} or less" if available else "leave --gpus out"
        raise UserError(
            f"the run asks for {asked}, and this machine has {available} {unit}.",
            "each process needs a device of its own.",
            f"{here_at_most}, or run where there are {topology.world_size} {unit}.",
        )
