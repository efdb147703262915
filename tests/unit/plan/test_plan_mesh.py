"""Groups of processes: who shares a pack, who holds one copy of the weights, and the engines that need a number."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.plan.run_plan import Topology
from packhorse.plan.topology import DeviceRequest, Hardware, check_machine, choose_topology
from packhorse.recipe.rules.model import parallel_rules
from packhorse.recipe.schema import ParallelSection

LAPTOP = Hardware(num_cores=2, gpus=())
BOX = Hardware(num_cores=96, gpus=("H100",) * 8)


def mesh(gpus: int, nodes: int | None = None, **parallel: Any) -> Topology:
    return choose_topology(ParallelSection(**parallel), DeviceRequest(gpus=gpus, nodes=nodes), LAPTOP)[0]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (mesh(16), (16, 16, None)),
        (mesh(16, sequence=4), (16, 4, None)),
        (mesh(16, engine="hsdp"), (16, 16, 8)),
        (mesh(16, nodes=4, engine="hsdp"), (16, 16, 4)),
        (mesh(16, engine="hsdp", shard_group=2, sequence=2), (16, 8, 2)),
        (mesh(16, engine="hsdp", shard_group=16), (16, 16, 16)),
    ],
    ids=["flat", "sequence", "one copy per node", "four nodes", "groups of two", "one copy"],
)
def test_groups_are_formed(topology: Topology, expected: tuple[int, int, int | None]) -> None:
    assert (topology.world_size, topology.data_ranks, topology.shard_group) == expected


@pytest.mark.parametrize(
    ("parallel", "gpus", "fact", "fix"),
    [
        ({"sequence": 3}, 8, "parallel.sequence is 3, which does not divide 8 processes", "2 or 4, or run 6 or 9"),
        ({"sequence": 16}, 8, "does not divide 8 processes", "to 8, or run 16 processes"),
        (
            {"engine": "hsdp", "shard_group": 3},
            8,
            "parallel.shard_group is 3, which does not divide 8 processes",
            "2 or 4, or run 6 or 9",
        ),
        ({"engine": "hsdp", "shard_group": 1}, 8, "1 of 8 processes would hold", "parallel.engine to ddp"),
        ({"engine": "hsdp"}, 1, "1 of 1 process would hold", "parallel.engine to ddp"),
        ({"engine": "single"}, 2, "parallel.engine is single, and the run has 2 processes", "parallel.engine to ddp"),
    ],
    ids=["sequence", "long sequence", "shard group", "group of one", "one process", "single"],
)
def test_meshes_that_cannot_work_are_refused(parallel: dict[str, Any], gpus: int, fact: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        mesh(gpus, **parallel)
    assert fact in str(caught.value)
    assert fix in str(caught.value)


def test_single_takes_one_of_many_gpus() -> None:
    assert choose_topology(ParallelSection(engine="single"), DeviceRequest(), BOX)[0].world_size == 1


@pytest.mark.parametrize(
    ("parallel", "fact"),
    [
        ({"engine": "fsdp2", "shard_group": 4}, "parallel.shard_group is 4, and parallel.engine is fsdp2"),
        ({"engine": "zero3_nvme"}, "parallel.engine is zero3_nvme, and parallel.nvme is not given"),
        ({"engine": "zero3", "nvme": "/scratch"}, "parallel.nvme is /scratch, and parallel.engine is zero3"),
        ({"engine": "hsdp", "shard_group": 4}, None),
        ({"engine": "zero3_nvme", "nvme": "/scratch"}, None),
    ],
    ids=["group without hsdp", "no folder", "folder unused", "hsdp", "nvme"],
)
def test_fields_belong_to_their_engine(parallel: dict[str, Any], fact: str | None) -> None:
    found = [finding.fact for finding in parallel_rules(ParallelSection(**parallel))]
    assert found == [] if fact is None else fact in found[0]


def test_four_processes_may_share_the_cores_of_a_small_machine() -> None:
    four, _ = choose_topology(ParallelSection(processes=4), DeviceRequest(), LAPTOP)
    check_machine(four, LAPTOP)
    five, _ = choose_topology(ParallelSection(processes=5), DeviceRequest(), LAPTOP)
    with pytest.raises(UserError, match="needs 5 processes, and this machine has 2 CPU cores"):
        check_machine(five, LAPTOP)
