"""How processes and packs are shared, and what is refused."""

from __future__ import annotations

import pytest

from packhorse.errors import UserError
from packhorse.plan.batch import null_packs_decision, split_batch
from packhorse.plan.topology import DeviceRequest, Hardware, check_machine, choose_topology
from packhorse.recipe.schema import BatchSection, ParallelSection

LAPTOP = Hardware(num_cores=4, gpus=())
BOX = Hardware(num_cores=96, gpus=("H100",) * 8)


@pytest.mark.parametrize(
    ("packs", "length", "micro", "world", "expected"),
    [
        (16, 2048, "auto", 1, (2, 8)),
        (16, 2048, "auto", 16, (1, 1)),
        (16, 8192, "auto", 2, (1, 8)),
        (12, 256, "auto", 2, (6, 1)),
        (16, 2048, 4, 2, (4, 2)),
    ],
)
def test_ranks_times_passes_times_micro_is_the_step(
    packs: int, length: int, micro: int | str, world: int, expected: tuple[int, int]
) -> None:
    split, decision = split_batch(BatchSection(packs=packs, length=length, micro=micro), world)
    assert (split.micro_packs, split.accumulation_steps) == expected
    assert world * split.accumulation_steps * split.micro_packs == packs
    assert decision.reason


@pytest.mark.parametrize(
    ("packs", "world", "waste", "instead"),
    [
        (16, 3, "2 of 18 packs are empty: 11% waste", "15 or 18 waste nothing"),
        (64, 6, "2 of 66 packs are empty: 3% waste", "60 or 66 waste nothing"),
        (16, 12, "8 of 24 packs are empty: 33% waste", "12 or 24 waste nothing"),
        (16, 8, None, ""),
    ],
)
def test_null_packs_complete_the_shares_and_are_reported(packs: int, world: int, waste: str, instead: str) -> None:
    split, _ = split_batch(BatchSection(packs=packs), world)
    assert split.packs_per_step == packs
    decision = null_packs_decision(split, world)
    assert (decision and decision.value) == waste
    assert decision is None or instead in decision.reason


def test_a_process_without_any_pack_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        split_batch(BatchSection(packs=16), 17)
    assert "batch.packs is 16, and there are 17 processes." in str(caught.value)
    assert "set batch.packs to 17" in str(caught.value)


def test_a_micro_that_does_not_divide_a_share_is_refused() -> None:
    with pytest.raises(UserError, match="does not divide the 8 packs of each process") as caught:
        split_batch(BatchSection(packs=16, micro=16), 2)
    assert "set batch.micro to 8" in str(caught.value)


@pytest.mark.parametrize(
    ("here", "ask", "processes", "expected"),
    [
        (LAPTOP, DeviceRequest(), "auto", ("cpu", 1, 1, 4)),
        (LAPTOP, DeviceRequest(), 2, ("cpu", 1, 2, 2)),
        (BOX, DeviceRequest(), "auto", ("cuda", 1, 8, 12)),
        (LAPTOP, DeviceRequest(gpus=64), "auto", ("cuda", 8, 8, 8)),
        (LAPTOP, DeviceRequest(gpus=16, nodes=4), "auto", ("cuda", 4, 4, 8)),
        (LAPTOP, DeviceRequest(gpus=2), 8, ("cuda", 1, 2, 8)),
    ],
    ids=["laptop", "two processes", "box", "64 GPUs", "16 GPUs on 4 nodes", "flag before recipe"],
)
def test_processes_are_placed(
    here: Hardware, ask: DeviceRequest, processes: int | str, expected: tuple[str, int, int, int]
) -> None:
    topology, decision = choose_topology(ParallelSection(processes=processes), ask, here)
    found = (topology.device, topology.num_nodes, topology.processes_per_node, topology.threads_per_process)
    assert found == expected
    assert topology.world_size == expected[1] * expected[2]
    assert decision.reason


def test_gpus_that_nodes_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match="--gpus is 10, which 4 nodes cannot share equally"):
        choose_topology(ParallelSection(), DeviceRequest(gpus=10, nodes=4), LAPTOP)


@pytest.mark.parametrize(
    ("ask", "processes", "fix"),
    [(DeviceRequest(gpus=2), "auto", "remove --gpus"), (DeviceRequest(), 5, "parallel.processes to 4")],
    ids=["GPUs without one", "too many processes"],
)
def test_more_than_the_machine_has_is_refused(ask: DeviceRequest, processes: int | str, fix: str) -> None:
    topology, _ = choose_topology(ParallelSection(processes=processes), ask, LAPTOP)
    with pytest.raises(UserError) as caught:
        check_machine(topology, LAPTOP)
    assert fix in str(caught.value)


def test_nodes_without_gpus_are_refused_where_nobody_says_how_many_processes_they_run() -> None:
    with pytest.raises(UserError, match="--nodes is 2 and --gpus is not given"):
        choose_topology(ParallelSection(), DeviceRequest(nodes=2), LAPTOP)


def test_nodes_without_gpus_share_the_processes_of_the_recipe() -> None:
    topology, decision = choose_topology(ParallelSection(processes=4, engine="ddp"), DeviceRequest(nodes=2), LAPTOP)
    assert (topology.device, topology.num_nodes, topology.processes_per_node) == ("cpu", 2, 2)
    assert "2 nodes" in decision.reason
    with pytest.raises(UserError, match="parallel.processes is 5, which 2 nodes cannot share"):
        choose_topology(ParallelSection(processes=5, engine="ddp"), DeviceRequest(nodes=2), LAPTOP)
