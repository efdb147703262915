from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from doctor_cases import GB, REQUEST, sound_nodes

from packhorse.doctor.diagnosis import diagnose
from packhorse.doctor.facts import BandwidthFacts, FailedConnection, Gpu, InterfaceChoice, NodeFacts
from packhorse.doctor.table import first_broken

Break = Callable[[list[NodeFacts]], list[NodeFacts]]


def on_second(part: str, **changes: Any) -> Break:
    """Change fields of a part of the second node; with an empty part, of the node itself."""

    def broken(nodes: list[NodeFacts]) -> list[NodeFacts]:
        whole = nodes[1]
        changed = {part: getattr(whole, part).model_copy(update=changes)} if part else changes
        return [nodes[0], whole.model_copy(update=changed)]

    return broken


def on_first(part: str, **changes: Any) -> Break:
    return lambda nodes: on_second(part, **changes)(nodes[::-1])[::-1]


VERSIONS = sound_nodes()[0].versions


def all_reduce(**changes: Any) -> Break:
    def broken(nodes: list[NodeFacts]) -> list[NodeFacts]:
        assert nodes[0].bandwidth is not None
        return on_first("", bandwidth=nodes[0].bandwidth.model_copy(update=changes))(nodes)

    return broken


BUSY = (
    Gpu(index="0", name="H100", memory_mib=81559, used_mib=4),
    Gpu(index="1", name="H100", memory_mib=81559, used_mib=20000),
)
CASES: dict[str, tuple[Break, str, str]] = {
    "a node is silent": (lambda nodes: nodes[:1], "nodes", "1 of 2 nodes answered (gpu1); number 1 did not"),
    "another torch": (
        on_second("", versions=VERSIONS | {"torch": "2.9.1"}),
        "versions",
        "torch is 2.13.0+cu128 on gpu1, 2.9.1 on gpu2",
    ),
    "a library is absent": (
        on_second("", versions={name: VERSIONS[name] for name in ("python", "packhorse", "torch")}),
        "versions",
        "nvidia-nccl-cu12 is 2.27.5 on gpu1, absent on gpu2",
    ),
    "a GPU is missing": (on_second("gpu", gpus=BUSY[:1], installed=1), "GPUs", "gpu2 has 1 of 2 GPUs"),
    "a GPU is hidden": (
        on_second("gpu", gpus=BUSY[:1], visible="0"),
        "GPUs",
        "gpu2 has 1 of 2 GPUs (of 2, by CUDA_VISIBLE_DEVICES=0)",
    ),
    "no nvidia-smi": (
        on_second("gpu", gpus=(), installed=0, error="no nvidia-smi on PATH"),
        "GPUs",
        "gpu2 has 0 of 2 GPUs (no nvidia-smi on PATH)",
    ),
    "a GPU is taken": (on_second("gpu", gpus=BUSY), "free GPUs", "GPU 1 of gpu2 has 20,000 of 81,559 MiB in use"),
    "torch for CPUs": (on_first("gpu", torch_cuda=""), "driver", "torch 2.13.0+cu128 on gpu1 is a CPU build"),
    "no driver": (on_second("gpu", driver_cuda=""), "driver", "gpu2 has no libcuda.so.1"),
    "an old driver": (on_second("gpu", driver_cuda="11.8"), "driver", "gpu2 has a driver for CUDA up to 11.8"),
    "no such name": (
        on_second("network", resolve_error="Name or service not known", rendezvous_error="not tried", met_nodes=()),
        "name",
        "gpu2 cannot resolve gpu1, the name of the first node",
    ),
    "the name is a loopback address": (
        on_second("network", resolved="127.0.1.1", rendezvous_error="Connection refused", met_nodes=()),
        "name",
        "gpu1, the name of the first node, is 127.0.1.1 on other nodes",
    ),
    "the port is taken": (
        on_first(
            "network", rendezvous_error="the first node cannot open port 20123: Address already in use", met_nodes=()
        ),
        "port",
        "Address already in use",
    ),
    "the port is blocked": (
        on_second("network", rendezvous_error="no answer", met_nodes=()),
        "port",
        "gpu2 cannot reach port 20123 of gpu1 (192.168.0.1): no answer",
    ),
    "no such interface": (
        on_second(
            "network", choices=(InterfaceChoice(library="gloo", interface="ib1", address="", error="there is no ib1"),)
        ),
        "interface",
        "gpu2: there is no ib1, so gloo finds none",
    ),
    "an interface that does not reach": (
        on_second(
            "network",
            failed_connections=(FailedConnection(node_id=0, library="nccl", address="10.0.0.1", error="no answer"),),
        ),
        "between nodes",
        "gpu2 cannot reach gpu1 at 10.0.0.1 (ib0, used by nccl): no answer",
    ),
    "a clock goes wrong": (
        on_second("network", clock_skew_seconds=-95.0),
        "clocks",
        "the clock of gpu2 is 95 s behind",
    ),
    "no folder": (on_second("folder", exists=False), "shared folder", "gpu2 has no folder /shared/runs/first"),
    "another plan": (on_second("folder", plan_sha256="b" * 64), "shared folder", "gpu2 sees another plan.json"),
    "no plan": (on_second("folder", plan_sha256=""), "shared folder", "gpu2 sees no plan.json in /shared/runs/first"),
    "an old copy": (
        on_second("folder", sees_request_file=False),
        "shared folder",
        "a file that was written there before",
    ),
    "each its own": (
        on_second("folder", sees_nodes=(1,)),
        "shared folder",
        "gpu2 does not see in /shared/runs/first the file of gpu1",
    ),
    "renames that tear": (
        on_second("folder", rename_faults=3, rename_fault="the file was absent"),
        "rename",
        "gpu2 found in 3 of 400 reads: the file was absent",
    ),
    "a full disk": (
        on_second("folder", write_error="No space left on device", sees_nodes=(), sees_request_file=False),
        "disk",
        "gpu2 cannot write to /shared/runs/first: No space left on device",
    ),
    "a small disk": (on_first("folder", free_bytes=20 * GB), "disk", "20.0 GB are free in /shared/runs/first"),
    "no scratch": (on_second("resources", scratch_error="/scratch: Permission denied"), "scratch", "gpu2 cannot write"),
    "a container's shared memory": (on_second("resources", shm_bytes=64 * 2**20), "shared memory", "/dev/shm of gpu2"),
    "no weights": (on_second("inputs", model_fault="it is not in /hf"), "weights", "on gpu2: it is not in /hf"),
    "torn data": (on_second("inputs", data_fault="ids.bin is missing."), "data", "on gpu2: ids.bin is missing."),
    "no all-reduce": (all_reduce(error="NCCL"), "bandwidth", "the all-reduce failed on gpu1: NCCL"),
    "a rank that failed and others that wait for it": (
        lambda nodes: on_second("", bandwidth=BandwidthFacts(error="NCCL"))(all_reduce(timed_out=True)(nodes)),
        "bandwidth",
        "the all-reduce failed on gpu2: NCCL",
    ),
    "another link": (
        all_reduce(bus_bytes_per_second=1.1 * GB),
        "bandwidth",
        "1.10 GB/s at 256 MiB, 40 us at 8 KiB; the link carries 50.00 GB/s, so 2% of it",
    ),
}


def test_all_is_well() -> None:
    rows = diagnose(REQUEST, sound_nodes())
    assert [row for row in rows if row.status != "ok"] == []
    assert [row.name for row in rows] == [
        "nodes", "versions", "GPUs", "free GPUs", "driver", "name", "port", "interface", "between nodes", "clocks",
        "shared folder", "rename", "disk", "scratch", "shared memory", "host memory", "weights", "data", "W&B",
        "bandwidth", "rank map",
    ]  # fmt: skip
    assert rows[-1].fact == "rank 0-1 on gpu1 GPU 0, 1; 2-3 on gpu2 GPU 0, 1"
    assert all(row.fact for row in rows)


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named(name: str) -> None:
    breaks, row_name, fact = CASES[name]
    rows = diagnose(REQUEST, breaks(sound_nodes()))
    broken = first_broken(rows)
    assert broken is not None
    assert (broken.name, broken.fix != "") == (row_name, True)
    assert fact in broken.fact
    assert [row.name for row in rows if row.status == "broken"] == [row_name]


@pytest.mark.parametrize(
    ("breaks", "row_name", "fact"),
    [
        (on_second("network", clock_skew_seconds=2.5), "clocks", "the clock of gpu2 is 2.5 s ahead"),
        (
            on_second("resources", memory_bytes=8 * GB, memory_from="its cgroup"),
            "host memory",
            "gpu2 may use 8.0 GB, the limit of its cgroup; the weights have 16.0 GB",
        ),
        (on_second("folder", lock_error="No locks available"), "shared folder", "gpu2 cannot lock a file"),
        (on_second("folder", rename_fault="stale handle"), "rename", "gpu2 got a stale handle"),
        (on_second("resources", scratch_free_bytes=GB), "scratch", "has 1.0 GB free"),
        (on_second("resources", locked_bytes=65536), "locked memory", "gpu2 has InfiniBand, and only 0.1 MB"),
        (on_second("inputs", model_fault="it is not in /hf", may_fetch=True), "weights", "it is not in /hf"),
        (on_first("inputs", wandb_error="no answer"), "W&B", "gpu1 cannot reach api.wandb.ai: no answer"),
        (
            on_second("", bandwidth=BandwidthFacts(timed_out=True)),
            "bandwidth",
            "the all-reduce did not end within 120 s on gpu2",
        ),
        (on_second("gpu", gpus=(BUSY[0], BUSY[0].model_copy(update={"name": "A100"}))), "GPUs", "3 x H100, 1 x A100"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_risk_is_a_note(breaks: Break, row_name: str, fact: str) -> None:
    rows = diagnose(REQUEST, breaks(sound_nodes()))
    assert first_broken(rows) is None
    found = [row for row in rows if row.status == "note"]
    assert [row.name for row in found] == [row_name]
    assert fact in found[0].fact
    assert found[0].fix


def test_checks_behind_a_blocked_port_are_not_tried() -> None:
    nodes = on_first("network", met_nodes=(0,))(sound_nodes())
    blocked = on_second(
        "network", rendezvous_error="no answer", met_nodes=(), num_connections=0, clock_skew_seconds=None
    )(nodes)
    seen = [node.model_copy(update={"folder": node.folder.model_copy(update={"sees_nodes": (0,)})}) for node in blocked]
    seen = [node.model_copy(update={"bandwidth": None}) for node in seen]
    statuses = {row.name: row.status for row in diagnose(REQUEST, seen)}
    assert [name for name, status in statuses.items() if status == "broken"] == ["port"]
    hidden = [name for name, status in statuses.items() if status == "not tried"]
    assert hidden == ["between nodes", "clocks", "bandwidth"]


def test_no_node_answers() -> None:
    rows = diagnose(REQUEST, [], "bash: python: command not found")
    assert [row.name for row in rows] == ["nodes"]
    assert "bash: python: command not found" in rows[0].fact


def test_a_host_without_a_name_is_broken_only_with_several_nodes() -> None:
    nameless = InterfaceChoice(
        library="gloo", interface="lo", address="127.0.0.1", error="the host name laptop does not resolve"
    )
    nodes = on_first("network", choices=(nameless,))(sound_nodes())
    assert first_broken(diagnose(REQUEST, nodes)).name == "interface"
    alone = REQUEST.model_copy(update={"num_nodes": 1, "gpus_per_node": 0, "fast": True})
    assert first_broken(diagnose(alone, nodes[:1])) is None


def test_one_machine_without_gpus_has_fewer_rows() -> None:
    alone = REQUEST.model_copy(update={"num_nodes": 1, "gpus_per_node": 0, "fast": True})
    rows = diagnose(alone, sound_nodes()[:1])
    assert first_broken(rows) is None
    assert {"GPUs", "driver", "port", "clocks", "rename", "bandwidth"}.isdisjoint(row.name for row in rows)
