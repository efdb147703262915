"""Devices of this machine, and the placement of processes that recipe and command line request."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.run_plan import Decision, Device, Topology
from packhorse.plan.visible_gpus import visible_gpus
from packhorse.recipe.schema import ParallelSection

GPUS_PER_NODE = 8
THREADS_PER_GPU = 8
# Number of processes that may share the cores of any machine, to try an engine before renting GPUs for it.
TRIAL_PROCESSES = 4


@dataclass(frozen=True)
class Hardware:
    """Devices of one machine.

    Attributes:
        num_cores: CPU cores that this process may use.
        gpus: Name of each visible NVIDIA GPU, in order.
        host_bytes: Memory of the machine, or the limit of the control group of this process; None if not known.
    """

    num_cores: int
    gpus: tuple[str, ...]
    host_bytes: int | None = None

    @property
    def device(self) -> Device:
        """Device for training: the GPUs if there are any."""
        return "cuda" if self.gpus else "cpu"


def detect_hardware() -> Hardware:
    """Detect cores, memory and GPUs, without torch (raises as `visible_gpus`)."""
    cores = len(os.sched_getaffinity(0))
    return Hardware(num_cores=cores, gpus=visible_gpus(), host_bytes=host_memory())


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this process may use, see `memory_limits`; None where they are not known."""
    return min(memory_limits(proc, groups).values(), default=None)


def memory_limits(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Return the bytes of the machine, the least limit of the control group and its parents, and the Slurm job's.

    Args:
        proc: Folder of the proc file system.
        groups: Folder of control groups: memory.max in version 2, memory.limit_in_bytes in version 1.
    """
    files = (proc / "meminfo", proc / "self" / "cgroup")
    machine, own = (path.read_text(encoding="utf-8") if path.is_file() else "" for path in files)
    limits = [("the machine", int(number) * 1024) for number in re.findall(r"MemTotal:\s+(\d+) kB", machine)]
    for _, controllers, path in (line.split(":", 2) for line in own.splitlines()):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        inside = Path(path.lstrip("/"))
        for limit in (root / group / file for group in (inside, *inside.parents)):
            if limit.is_file() and (number := limit.read_text(encoding="utf-8").strip()).isdecimal():
                limits.append(("its cgroup", int(number)))
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    if granted.isdecimal() and int(granted) > 0:
        limits.append(("its Slurm job", int(granted) * 2**20))
    # Of several limits of one kind the least one stays.
    return dict(sorted(limits, key=lambda limit: -limit[1]))


@dataclass(frozen=True)
class DeviceRequest:
    """Devices that the command line requests.

    Attributes:
        gpus: Total number of GPUs (`--gpus`); None to follow the recipe or the machine.
        nodes: Number of machines that share them (`--nodes`).
        on_cpus: Whether the machines have no GPUs and share `parallel.processes`.
        capability: Compute capability of the GPUs, such as 9.0; None where it is not known.
    """

    gpus: int | None = None
    nodes: int | None = None
    on_cpus: bool = False
    capability: float | None = None


def choose_topology(parallel: ParallelSection, request: DeviceRequest, machine: Hardware) -> tuple[Topology, Decision]:
    """Place processes on devices, and return the reason.

    Raises:
        UserError: The nodes cannot share the GPUs equally, or the engine or the groups of the recipe do not fit this
            number of processes.
    """
    flat, decision = _place(parallel, request, machine)
    return with_mesh(parallel, flat), decision


def _place(parallel: ParallelSection, request: DeviceRequest, machine: Hardware) -> tuple[Topology, Decision]:
    if request.gpus is not None:
        return _on_gpus(parallel, request.gpus, request.nodes)
    if request.on_cpus:
        return _on_cpus(parallel, request.nodes or 1, machine)
    if request.nodes is not None:
        if machine.gpus or parallel.processes == "auto":
            raise _missing_gpus(request.nodes)
        return _on_cpus(parallel, request.nodes, machine)
    return _on_this_machine(parallel, machine)


def _on_this_machine(parallel: ParallelSection, machine: Hardware) -> tuple[Topology, Decision]:
    available = len(machine.gpus) if machine.gpus else machine.num_cores
    if parallel.processes == "auto":
        count = 1 if parallel.engine == "single" else len(machine.gpus) or 1
        cores = "" if machine.gpus else f" and {machine.num_cores} CPU cores"
        reason = f"this machine has {len(machine.gpus)} GPUs{cores}"
    else:
        count, reason = parallel.processes, "parallel.processes of the recipe"
    reason += f" ({available} {'GPUs' if machine.gpus else 'CPU cores'} here)"
    return _placed(parallel, machine.device, 1, count, machine.num_cores // count, reason)


def _placed(
    parallel: ParallelSection, device: Device, nodes: int, count: int, threads: int, reason: str
) -> tuple[Topology, Decision]:
    """Return `count` processes on these nodes, and the reason."""
    assert parallel.engine != "auto", "auto is resolved before processes are placed"
    topology = Topology(
        device=device,
        engine=parallel.engine,
        num_nodes=nodes,
        processes_per_node=count // nodes,
        threads_per_process=max(1, threads),
    )
    return topology, Decision(name="processes", value=str(count), reason=reason)


def _missing_gpus(nodes: int) -> UserError:
    return UserError(
        f"--nodes is {nodes} and --gpus is not given.",
        "--nodes sets how many machines share the GPUs; without --gpus it would be ignored.",
        f"give both, for example --gpus {8 * nodes} --nodes {nodes}; for nodes without GPUs set "
        f"parallel.processes, for example to {nodes}.",
    )


def _on_gpus(parallel: ParallelSection, gpus: int, nodes: int | None) -> tuple[Topology, Decision]:
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
    reason = f"--gpus {gpus}: {gpus // num_nodes} GPUs on each of {num_nodes} nodes, one process per GPU"
    return _placed(parallel, "cuda", num_nodes, gpus, THREADS_PER_GPU, reason)


def _on_cpus(parallel: ParallelSection, nodes: int, machine: Hardware) -> tuple[Topology, Decision]:
    """Place processes on nodes without GPUs, each with the cores of this machine."""
    count = nodes if parallel.processes == "auto" else parallel.processes
    if count % nodes:
        raise UserError(
            f"parallel.processes is {count}, which {nodes} nodes cannot share equally.",
            "each node runs the same number of processes.",
            f"set parallel.processes to {_nearest_multiples(count, nodes)}, or --nodes to a divisor of {count}.",
        )
    reason = f"{count // nodes} on each of {nodes} nodes without GPUs"
    return _placed(parallel, "cpu", nodes, count, machine.num_cores * nodes // count, reason)


def with_mesh(parallel: ParallelSection, flat: Topology) -> Topology:
    """Return the topology with groups that share a pack, and groups that shard one copy of the weights.

    Ranks of a group are consecutive.

    Raises:
        UserError: The processes do not fit the engine, or cannot form groups of that size.
    """
    world, sequence = flat.world_size, parallel.sequence
    if parallel.engine == "single" and world > 1:
        raise UserError(
            f"parallel.engine is single, and the run has {world} processes.",
            "single trains in one process; several would each train a separate model.",
            "set parallel.engine to ddp, or parallel.processes to 1.",
        )
    if world % sequence:
        raise UserError(
            f"parallel.sequence is {sequence}, which does not divide {_processes(world)}.",
            "each group of processes shares one pack.",
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
            f"under hsdp, 1 of {_processes(flat.world_size)} would hold one copy of the weights.",
            "a group of one process shards nothing, as ddp does.",
            "set parallel.engine to ddp, or parallel.shard_group (default: the processes of a node) to 2 or more.",
        )
    if flat.world_size % size:
        raise UserError(
            f"parallel.shard_group is {size}, which does not divide {_processes(flat.world_size)}.",
            "each group of processes holds one copy of the weights.",
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


def check_machine(topology: Topology, machine: Hardware) -> None:
    """Refuse a run that needs more devices than this machine has.

    Raises:
        UserError: There are more processes than GPUs or, without GPUs, than CPU cores and `TRIAL_PROCESSES`.
    """
    on_gpus = topology.device == "cuda"
    devices, unit = (len(machine.gpus), "GPUs") if on_gpus else (machine.num_cores, "CPU cores")
    available = devices if on_gpus else max(devices, TRIAL_PROCESSES)
    if topology.processes_per_node > available or topology.num_nodes > 1:
        needed = _processes(topology.world_size) + (f" on {topology.num_nodes} nodes" * (topology.num_nodes > 1))
        fix = f"set parallel.processes to {available} or less" if available else "remove --gpus"
        raise UserError(
            f"the run needs {needed}, and this machine has {devices} {unit}.",
            "each process needs a separate device.",
            f"{fix}, or use machines with {topology.world_size} {unit}.",
        )
