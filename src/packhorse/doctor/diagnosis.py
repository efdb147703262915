"""From the nodes' answers to the rows of the table: pure functions, so that every fault can be tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from packhorse.doctor.diagnosis_network import (
    bandwidth_row,
    clock_row,
    connection_row,
    first_hosts,
    interface_row,
    name_row,
    port_row,
)
from packhorse.doctor.diagnosis_storage import (
    data_row,
    disk_row,
    folder_row,
    model_row,
    rename_row,
    scratch_row,
    wandb_row,
)
from packhorse.doctor.facts import DoctorRequest, NodeFacts
from packhorse.doctor.machine import SHM
from packhorse.doctor.table import Row, broken, not_tried, note, ok
from packhorse.durable import size

MIB: Final = 2**20
BUSY_SHARE: Final = 0.05
"""Share of a GPU's memory in use by others; a driver and its daemons use less."""
LEAST_SHM_BYTES: Final = 64 * MIB
"""Default of a container, too little for NCCL."""
GOOD_SHM_BYTES: Final = 1024 * MIB

Check = Callable[[DoctorRequest, Sequence[NodeFacts]], Row | None]


def diagnose(request: DoctorRequest, nodes: Sequence[NodeFacts], other_output: str = "") -> list[Row]:
    """Return all rows; a row may depend on those above it.

    Args:
        request: What the nodes checked.
        nodes: Answers, by number of the node.
        other_output: Last lines of other output, for nodes that did not answer.
    """
    rows: dict[str, Row | None] = {"nodes": nodes_row(request, nodes, other_output)}
    for name, check in CHECKS.items() if nodes else ():
        rows[name] = None if request.num_nodes == 1 and name in OF_SEVERAL_NODES else check(request, nodes)
    return [replace(row, name=name) for name, row in rows.items() if row is not None]


def nodes_row(request: DoctorRequest, nodes: Sequence[NodeFacts], other_output: str) -> Row:
    """Check that every node answered."""
    hosts = ", ".join(node.host for node in nodes)
    if len(nodes) == request.num_nodes:
        return ok(f"{len(nodes)} node{'s' * (len(nodes) != 1)} answered: {hosts}")
    silent = [str(number) for number in range(request.num_nodes) if number not in {node.node_id for node in nodes}]
    output = f"; output of Slurm and the nodes: {other_output}" if other_output else ""
    return broken(
        f"{len(nodes)} of {request.num_nodes} nodes answered ({hosts or 'none'}); number {', '.join(silent)} did not"
        + output,
        "log in to a silent node and start the same python there: it must be installed under the same path, on a disk "
        "that all nodes see; modules, environment and container of the site profile prepare a node.",
    )


def versions_row(_: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that Python and the libraries have the same versions on all nodes."""
    names = dict.fromkeys(name for node in nodes for name in node.versions)
    differing = []
    for name in names:
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            by_version.setdefault(node.versions.get(name, "absent"), []).append(node.host)
        if len(by_version) > 1:
            versions = ", ".join(f"{version} on {first_hosts(hosts)}" for version, hosts in by_version.items())
            differing.append(f"{name} is {versions}")
    if not differing:
        own = nodes[0].versions
        shown = ", ".join(f"{name} {own[name]}" for name in ("packhorse", "torch", "accelerate") if name in own)
        return ok(f"all {len(own)} are the same on all nodes: {shown}")
    return broken(
        "; ".join(differing),
        "use one environment that all nodes see, or install the same versions on each; look at PATH and PYTHONPATH.",
    )


def gpu_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that every node has the requested GPUs."""
    if not request.gpus_per_node:
        return None
    if all(node.gpu.torch_rocm for node in nodes):
        rocm = nodes[0].gpu.torch_rocm
        return not_tried(f"torch was built for ROCm {rocm}; the doctor supports NVIDIA GPUs only")
    short = []
    for node in nodes:
        count = len(node.gpu.gpus)
        if count < request.gpus_per_node:
            why = f" ({node.gpu.error})" if node.gpu.error else ""
            if not why and node.gpu.visible is not None and node.gpu.installed > count:
                why = f" (of {node.gpu.installed}, by CUDA_VISIBLE_DEVICES={node.gpu.visible})"
            short.append(f"{node.host} has {count} of {request.gpus_per_node} GPUs{why}")
    if short:
        return broken(
            "; ".join(short),
            "exclude that node (sbatch --exclude=NODE) and report it to the administrators; if all nodes lack GPUs, "
            "request as many GPUs per node as there are.",
        )
    kinds = Counter(gpu.name for node in nodes for gpu in node.gpu.gpus)
    counts = ", ".join(f"{number} x {name}" for name, number in kinds.items())
    if len(kinds) > 1:
        return note(f"of several types: {counts}", "the slowest sets the pace: request one type.")
    return ok(f"{request.gpus_per_node} per node: {counts}")


def free_gpu_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that no other program uses memory of the GPUs."""
    gpus = [(node.host, gpu) for node in nodes for gpu in node.gpu.gpus]
    if not request.gpus_per_node or not gpus:
        return None
    busy = [
        f"GPU {gpu.index} of {host} has {gpu.used_mib:,} of {gpu.memory_mib:,} MiB in use"
        for host, gpu in gpus
        if gpu.memory_mib and gpu.used_mib > BUSY_SHARE * gpu.memory_mib
    ]
    if busy:
        return broken(
            _first_items(busy),
            "end the programs there (nvidia-smi lists them), or exclude that node (sbatch --exclude=NODE).",
        )
    most = max(gpu.used_mib for _, gpu in gpus)
    return ok(f"all {len(gpus)}, at most {most:,} MiB in use")


def driver_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check that the driver runs the CUDA version that torch was built for.

    A driver runs every CUDA of its major version or an older one (CUDA compatibility guide, minor versions).
    """
    if not request.gpus_per_node or all(node.gpu.torch_rocm for node in nodes):
        return None
    for node in nodes:
        built, driver = node.gpu.torch_cuda, node.gpu.driver_cuda
        if not built:
            return broken(
                f"torch {node.versions.get('torch', '')} on {node.host} is a CPU build",
                "install a build of torch for CUDA: https://pytorch.org/get-started/locally.",
            )
        if not driver or int(driver.split(".")[0]) < int(built.split(".")[0]):
            has = f"{node.host} has a driver for CUDA up to {driver}" if driver else f"{node.host} has no libcuda.so.1"
            return broken(
                f"torch was built for CUDA {built}, and {has}",
                "install a build of torch for the driver's CUDA, or update the driver; start a container with --nv.",
            )
    drivers = dict.fromkeys(node.gpu.driver_cuda for node in nodes)
    return ok(f"CUDA up to {', '.join(drivers)}; torch was built for {nodes[0].gpu.torch_cuda}")


def shm_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check the size of /dev/shm, through which processes of a node communicate."""
    least = min(nodes, key=lambda node: node.resources.shm_bytes)
    fact = f"{SHM} of {least.host} has {size(least.resources.shm_bytes)}"
    fix = "give containers more: docker --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm."
    if request.gpus_per_node > 1 and least.resources.shm_bytes <= LEAST_SHM_BYTES:
        return broken(f"{fact}; NCCL needs more between the GPUs of a node", fix)
    if request.gpus_per_node > 1 and least.resources.shm_bytes < GOOD_SHM_BYTES:
        return note(fact, fix)
    return ok(fact)


def memory_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Compare the memory limit of a node with the weights; a note only, since most methods read one layer at a time."""
    least = min(nodes, key=lambda node: node.resources.memory_bytes)
    limit = least.resources.memory_bytes
    fact = f"{least.host} may use {size(limit)}, the limit of {least.resources.memory_from}"
    if request.weights_bytes > limit:
        return note(
            f"{fact}; the weights have {size(request.weights_bytes)}",
            "if loading is slow or runs out of memory, request more: memory_per_gpu in the site profile.",
        )
    return ok(fact)


def locked_row(_: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Check the limit of locked memory, which InfiniBand needs."""
    limited = [node for node in nodes if node.resources.infiniband and node.resources.locked_bytes >= 0]
    if not limited:
        return None
    return note(
        f"{limited[0].host} has InfiniBand, and only {size(limited[0].resources.locked_bytes)} may be locked",
        "NCCL registers memory with the card: ask for `ulimit -l unlimited` in jobs (PropagateResourceLimits).",
    )


def rank_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """List the ranks of each node and its GPUs."""
    ranks = request.gpus_per_node or 1
    parts = []
    for node in nodes:
        first = node.node_id * ranks
        numbers = f"{first}-{first + ranks - 1}" if ranks > 1 else str(first)
        gpus = ", ".join(gpu.index for gpu in node.gpu.gpus[:ranks]) if request.gpus_per_node else ""
        parts.append(f"{numbers} on {node.host}" + (f" GPU {gpus}" if gpus else ""))
    what = "rank" if request.gpus_per_node else "launcher"
    return ok(f"{what} {_first_items(parts, 16)}")


def _first_items(items: Iterable[str], most: int = 4) -> str:
    every = list(items)
    return "; ".join(every[:most]) + (f"; and {len(every) - most} more" if len(every) > most else "")


CHECKS: Final[Mapping[str, Check]] = {
    "versions": versions_row,
    "GPUs": gpu_row,
    "free GPUs": free_gpu_row,
    "driver": driver_row,
    "name": name_row,
    "port": port_row,
    "interface": interface_row,
    "between nodes": connection_row,
    "clocks": clock_row,
    "shared folder": folder_row,
    "rename": rename_row,
    "disk": disk_row,
    "scratch": scratch_row,
    "shared memory": shm_row,
    "host memory": memory_row,
    "locked memory": locked_row,
    "weights": model_row,
    "data": data_row,
    "W&B": wandb_row,
    "bandwidth": bandwidth_row,
    "rank map": rank_row,
}
"""Every check but that of the number of nodes, by the name of its row."""
OF_SEVERAL_NODES: Final = ("name", "port", "between nodes", "clocks")
