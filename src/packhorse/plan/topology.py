"""From what the recipe and the command line ask for to which processes run where."""

from __future__ import annotations

from dataclasses import dataclass

from packhorse.errors import UserError
from packhorse.plan.hardware import Hardware
from packhorse.plan.run_plan import Decision, Topology
from packhorse.recipe.schema import Engine, ParallelSection

GPUS_PER_NODE = 8
THREADS_PER_GPU = 8
# So many processes may share the cores of any machine: a mesh is tried before it is paid for.
TRIAL_PROCESSES = 4


@dataclass(frozen=True)
class Ask:
    """What the command line asks for.

    Attributes:
        gpus: GPUs in all (`--gpus`), None to take what the recipe or the machine says.
        nodes: Machines that share them (`--nodes`).
        on_cpus: The machines have no GPUs; they share `parallel.processes`.
    """

    gpus: int | None = None
    nodes: int | None = None
    on_cpus: bool = False


def choose_topology(parallel: ParallelSection, ask: Ask, here: Hardware) -> tuple[Topology, Decision]:
    """Places processes on devices; says why.

    Raises:
        UserError: The GPUs asked for cannot be shared equally over the nodes, or the engine or the mesh that the recipe
            asks for cannot be had with so many processes.
    """
    flat, decision = _place(parallel, ask, here)
    return with_mesh(parallel, flat), decision


def _place(parallel: ParallelSection, ask: Ask, here: Hardware) -> tuple[Topology, Decision]:
    if ask.gpus is not None:
        return _asked_gpus(parallel, ask.gpus, ask.nodes)
    if ask.on_cpus:
        return _asked_cpus(parallel, ask.nodes or 1, here)
    if ask.nodes is not None:
        if here.gpus or parallel.processes == "auto":
            raise _no_gpus_asked(ask.nodes)
        return _asked_cpus(parallel, ask.nodes, here)
    wanted = parallel.processes
    available = len(here.gpus) if here.gpus else here.num_cores
    if wanted == "auto":
        count = 1 if parallel.engine == "single" else len(here.gpus) or 1
        reason = f"this machine has {len(here.gpus)} GPUs" + ("" if here.gpus else f" and {here.num_cores} CPU cores")
    else:
        count, reason = wanted, "parallel.processes of the recipe"
    topology = Topology(
        device=here.device,
        engine=_engine(parallel),
        num_nodes=1,
        processes_per_node=count,
        threads_per_process=max(1, here.num_cores // count),
    )
    where = "GPUs" if here.gpus else "CPU cores"
    return topology, Decision(name="processes", value=str(count), reason=f"{reason} ({available} {where} here)")


def _no_gpus_asked(nodes: int) -> UserError:
    return UserError(
        f"--nodes is {nodes} and --gpus is not given.",
        "GPUs are shared out over the nodes; without them the number of nodes would be ignored.",
        f"give both, for example --gpus {8 * nodes} --nodes {nodes}; for nodes without GPUs set "
        f"parallel.processes, for example to {nodes}.",
    )


def _engine(parallel: ParallelSection) -> Engine:
    assert parallel.engine != "auto", "auto is settled before processes are placed"
    return parallel.engine


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
            f"set --gpus to {_nearest_multiples(gpus, num_nodes)}.",
        )
    topology = Topology(
        device="cuda",
        engine=_engine(parallel),
        num_nodes=num_nodes,
        processes_per_node=gpus // num_nodes,
        threads_per_process=THREADS_PER_GPU,
    )
    return topology, Decision(
        name="processes",
        value=str(gpus),
        reason=f"--gpus {gpus}: {gpus // num_nodes} GPUs on each of {num_nodes} nodes, a process a GPU",
    )


def _asked_cpus(parallel: ParallelSection, nodes: int, here: Hardware) -> tuple[Topology, Decision]:
    """Machines without GPUs, each with the cores of `here`."""
    count = nodes if parallel.processes == "auto" else parallel.processes
    if count % nodes:
        raise UserError(
            f"parallel.processes is {count}, which {nodes} nodes cannot share equally.",
            "each node runs the same number of processes.",
            f"set parallel.processes to {_nearest_multiples(count, nodes)}, or --nodes to a divisor of {count}.",
        )
    topology = Topology(
        device="cpu",
        engine=_engine(parallel),
        num_nodes=nodes,
        processes_per_node=count // nodes,
        threads_per_process=max(1, here.num_cores * nodes // count),
    )
    shared = f"{count // nodes} on each of {nodes} nodes without GPUs"
    return topology, Decision(name="processes", value=str(count), reason=shared)


def with_mesh(parallel: ParallelSection, flat: Topology) -> Topology:
    """Adds who shares a pack and who holds one copy of the weights together; ranks of a group are neighbours.

    Raises:
        UserError: The processes do not fit the engine, or cannot be shared out into groups of that size.
    """
    world, sequence = flat.world_size, parallel.sequence
    if parallel.engine == "single" and world > 1:
        raise UserError(
            f"parallel.engine is single, and the run has {world} processes.",
            "single trains in one process; more would each train a model of their own.",
            "set parallel.engine to ddp, or parallel.processes to 1.",
        )
    if world % sequence:
        raise UserError(
            f"parallel.sequence is {sequence}, which does not divide {_processes(world)}.",
            "each pack is shared by a whole group of processes.",
            f"set parallel.sequence to {_nearest_divisors(world, sequence)},"
            f" or run {_nearest_multiples(world, sequence)} processes.",
        )
    return flat.model_copy(update={"sequence": sequence, "shard_group": _shard_group(parallel, flat)})


def _shard_group(parallel: ParallelSection, flat: Topology) -> int | None:
    if parallel.engine != "hsdp":
        return None
    size = parallel.shard_group or flat.processes_per_node
    if size == 1:
        raise UserError(
            f"one copy of the weights under hsdp would be held by 1 of {_processes(flat.world_size)}.",
            "a group of one shards nothing: that is what ddp does.",
            "set parallel.engine to ddp, or parallel.shard_group (absent: the processes of a node) to 2 or more.",
        )
    if flat.world_size % size:
        raise UserError(
            f"parallel.shard_group is {size}, which does not divide {_processes(flat.world_size)}.",
            "each copy of the weights is held by a whole group of processes.",
            f"set parallel.shard_group to {_nearest_divisors(flat.world_size, size, least=2)},"
            f" or run {_nearest_multiples(flat.world_size, size)} processes.",
        )
    return size


def _processes(count: int) -> str:
    return f"{count} process" + "es" * (count > 1)


def _nearest_divisors(world: int, size: int, least: int = 1) -> str:
    divisors = [number for number in range(least, world + 1) if world % number == 0]
    below = [number for number in divisors if number < size][-1:]
    return " or ".join(str(number) for number in below + [n for n in divisors if n > size][:1])


def _nearest_multiples(world: int, size: int) -> str:
    below = world // size * size
    return " or ".join(str(number) for number in (below, below + size) if number)


def check_machine(topology: Topology, here: Hardware) -> None:
    """Refuses a run that this machine has no devices for.

    Raises:
        UserError: More processes than GPUs or, where there is no GPU, than CPU cores and `TRIAL_PROCESSES`.
    """
    on_gpus = topology.device == "cuda"
    devices, unit = (len(here.gpus), "GPUs") if on_gpus else (here.num_cores, "CPU cores")
    available = devices if on_gpus else max(devices, TRIAL_PROCESSES)
    if topology.processes_per_node > available or topology.num_nodes > 1:
        asked = _processes(topology.world_size) + (f" on {topology.num_nodes} nodes" * (topology.num_nodes > 1))
        here_at_most = f"set parallel.processes to {available} or less" if available else "leave --gpus out"
        raise UserError(
            f"the run asks for {asked}, and this machine has {devices} {unit}.",
            "each process needs a device of its own.",
            f"{here_at_most}, or run where there are {topology.world_size} {unit}.",
        )
