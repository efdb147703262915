"""From what the nodes said to the rows of the table: pure, so that every fault can be put to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from packhorse.doctor.facts import NodeFacts, Question
from packhorse.doctor.judge_network import (
    bandwidth_row,
    clock_row,
    interface_row,
    name_row,
    port_row,
    reach_row,
)
from packhorse.doctor.judge_storage import (
    data_row,
    disk_row,
    folder_row,
    model_row,
    rename_row,
    scratch_row,
    wandb_row,
)
from packhorse.doctor.machine import SHM
from packhorse.doctor.rows import Row
from packhorse.durable import size

MIB: Final = 2**20
BUSY_SHARE: Final = 0.05
"""Of a card's memory: a driver and its daemons keep a part of it."""
LEAST_SHM_BYTES: Final = 64 * MIB
"""What a container is given by default, and NCCL soon exceeds."""
GOOD_SHM_BYTES: Final = 1024 * MIB

Judge = Callable[[Question, Sequence[NodeFacts]], Row | None]


def judge(question: Question, nodes: Sequence[NodeFacts], unheard: str = "") -> list[Row]:
    """All rows, in the order in which one depends on those above it.

    Args:
        question: What was asked.
        nodes: Who answered, by number.
        unheard: What was said where a node did not answer.
    """
    judges: tuple[Judge, ...] = (
        lambda asked, _: nodes_row(asked, nodes, unheard),
        versions_row,
        gpu_row,
        free_gpu_row,
        driver_row,
        name_row,
        port_row,
        interface_row,
        reach_row,
        clock_row,
        folder_row,
        rename_row,
        disk_row,
        scratch_row,
        shm_row,
        memory_row,
        locked_row,
        model_row,
        data_row,
        wandb_row,
        bandwidth_row,
        map_row,
    )
    found = (each(question, nodes) for each in (judges if nodes else judges[:1]))
    return [row for row in found if row is not None]


def nodes_row(question: Question, nodes: Sequence[NodeFacts], unheard: str) -> Row:
    """Did every node answer?"""
    named = ", ".join(node.host for node in nodes)
    if len(nodes) == question.num_nodes:
        return Row("nodes", "ok", f"{_count(len(nodes), 'node')} answered: {named}")
    silent = [str(number) for number in range(question.num_nodes) if number not in {node.node_id for node in nodes}]
    said = f"; Slurm and the nodes said: {unheard}" if unheard else ""
    return Row(
        "nodes",
        "broken",
        f"{len(nodes)} of {question.num_nodes} nodes answered ({named or 'none'}); number {', '.join(silent)} did not"
        + said,
        "log in to a silent node and start the same python there: it must be installed under the same path, on a disk "
        "that all nodes see; in a site profile, modules, environment and container say how.",
    )


def versions_row(_: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Are Python and the libraries the same everywhere?"""
    names = dict.fromkeys(name for node in nodes for name in node.versions)
    differing = []
    for name in names:
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            by_version.setdefault(node.versions.get(name, "absent"), []).append(node.host)
        if len(by_version) > 1:
            said = ", ".join(f"{version} on {_few(hosts)}" for version, hosts in by_version.items())
            differing.append(f"{name} is {said}")
    if not differing:
        own = nodes[0].versions
        shown = ", ".join(f"{name} {own[name]}" for name in ("packhorse", "torch", "accelerate") if name in own)
        return Row("versions", "ok", f"the same {len(own)} everywhere: {shown}")
    return Row(
        "versions",
        "broken",
        "; ".join(differing),
        "use one environment that all nodes see, or install the same versions on each; look at PATH and PYTHONPATH.",
    )


def gpu_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Has every node the GPUs that were asked for?"""
    if not question.gpus_per_node:
        return None
    if all(node.gpu.torch_rocm for node in nodes):
        return Row(
            "GPUs", "not tried", f"torch was built for ROCm {nodes[0].gpu.torch_rocm}; only NVIDIA's are looked at"
        )
    short = []
    for node in nodes:
        found = len(node.gpu.gpus)
        if found < question.gpus_per_node:
            why = f" ({node.gpu.error})" if node.gpu.error else ""
            if not why and node.gpu.visible is not None and node.gpu.installed > found:
                why = f" (of {node.gpu.installed}, by CUDA_VISIBLE_DEVICES={node.gpu.visible})"
            short.append(f"{node.host} has {found} of {question.gpus_per_node} GPUs{why}")
    if short:
        return Row(
            "GPUs",
            "broken",
            "; ".join(short),
            "leave that node out (sbatch --exclude=NODE) and tell the cluster's admins; if all are short, ask for as "
            "many GPUs a node as there are.",
        )
    kinds = Counter(gpu.name for node in nodes for gpu in node.gpu.gpus)
    said = ", ".join(f"{number} x {name}" for name, number in kinds.items())
    if len(kinds) > 1:
        return Row("GPUs", "note", f"of several kinds: {said}", "the slowest sets the pace: ask for one kind.")
    return Row("GPUs", "ok", f"{question.gpus_per_node} a node: {said}")


def free_gpu_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Does anything else hold memory of the GPUs?"""
    gpus = [(node.host, gpu) for node in nodes for gpu in node.gpu.gpus]
    if not question.gpus_per_node or not gpus:
        return None
    busy = [
        f"GPU {gpu.index} of {host} has {gpu.used_mib:,} of {gpu.memory_mib:,} MiB in use"
        for host, gpu in gpus
        if gpu.memory_mib and gpu.used_mib > BUSY_SHARE * gpu.memory_mib
    ]
    if busy:
        return Row(
            "free GPUs",
            "broken",
            _some(busy),
            "end what runs there (nvidia-smi names it), or leave that node out (sbatch --exclude=NODE).",
        )
    most = max(gpu.used_mib for _, gpu in gpus)
    return Row("free GPUs", "ok", f"all {len(gpus)}, at most {most:,} MiB in use")


def driver_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Can the driver run what torch was built for?

    A driver runs every CUDA of its own major version or an older one (CUDA compatibility guide, minor versions).
    """
    if not question.gpus_per_node or all(node.gpu.torch_rocm for node in nodes):
        return None
    for node in nodes:
        built, driver = node.gpu.torch_cuda, node.gpu.driver_cuda
        if not built:
            return Row(
                "driver",
                "broken",
                f"torch {node.versions.get('torch', '')} on {node.host} is a build for CPUs",
                "install a build of torch for CUDA: https://pytorch.org/get-started/locally.",
            )
        if not driver or int(driver.split(".")[0]) < int(built.split(".")[0]):
            has = f"runs CUDA up to {driver}" if driver else "is not there (no libcuda.so.1)"
            return Row(
                "driver",
                "broken",
                f"torch was built for CUDA {built}, and the driver of {node.host} {has}",
                "install a build of torch for that CUDA, or have the driver renewed; in a container, give --nv.",
            )
    drivers = dict.fromkeys(node.gpu.driver_cuda for node in nodes)
    return Row("driver", "ok", f"CUDA up to {', '.join(drivers)}; torch was built for {nodes[0].gpu.torch_cuda}")


def shm_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Is there room in /dev/shm, through which processes of a node talk?"""
    least = min(nodes, key=lambda node: node.room.shm_bytes)
    said = f"{SHM} of {least.host} has {size(least.room.shm_bytes)}"
    fix = "give containers more: docker --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm."
    if question.gpus_per_node > 1 and least.room.shm_bytes <= LEAST_SHM_BYTES:
        return Row("shared memory", "broken", f"{said}; NCCL needs more between GPUs of a node", fix)
    if question.gpus_per_node > 1 and least.room.shm_bytes < GOOD_SHM_BYTES:
        return Row("shared memory", "note", said, fix)
    return Row("shared memory", "ok", said)


def memory_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """May a node take as much memory as the weights have? Most methods read them a layer at a time."""
    least = min(nodes, key=lambda node: node.room.memory_bytes)
    said = f"{least.host} may take {size(least.room.memory_bytes)}, by {least.room.memory_from}"
    if question.weights_bytes > least.room.memory_bytes:
        return Row(
            "host memory",
            "note",
            f"{said}; the weights have {size(question.weights_bytes)}",
            "if loading is slow, or ended for want of memory, ask for more: memory_per_gpu in the site profile.",
        )
    return Row("host memory", "ok", said)


def locked_row(_: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """May memory be locked, where InfiniBand needs it?"""
    bound = [node for node in nodes if node.room.infiniband and node.room.locked_bytes >= 0]
    if not bound:
        return None
    return Row(
        "locked memory",
        "note",
        f"{bound[0].host} has InfiniBand, and only {size(bound[0].room.locked_bytes)} may be locked",
        "NCCL registers memory with the card: have `ulimit -l unlimited` set for jobs (PropagateResourceLimits).",
    )


def map_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Which rank computes where?"""
    ranks = question.gpus_per_node or 1
    parts = []
    for node in nodes:
        first = node.node_id * ranks
        numbers = f"{first}-{first + ranks - 1}" if ranks > 1 else str(first)
        on = ", ".join(gpu.index for gpu in node.gpu.gpus[:ranks]) if question.gpus_per_node else ""
        parts.append(f"{numbers} on {node.host}" + (f" GPU {on}" if on else ""))
    what = "rank" if question.gpus_per_node else "launcher"
    return Row("rank map", "ok", f"{what} {_some(parts, 16)}")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _some(lines: Iterable[str], most: int = 4) -> str:
    every = list(lines)
    return "; ".join(every[:most]) + (f"; and {len(every) - most} more" if len(every) > most else "")
