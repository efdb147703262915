"""`packhorse quickstart` plans both recipes on any machine: without a GPU, with one, with many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from packhorse.cli.quickstart import STEPS, process_overrides
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, check_machine, detect_hardware
from packhorse.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("num_gpus", "device", "processes"), [(0, "cpu", 2), (1, "cuda", 1), (2, "cuda", 2), (8, "cuda", 2)]
)
def test_the_quickstart_fits_every_number_of_gpus(
    num_gpus: int,
    device: str,
    processes: int,
    write_nvidia_smi: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_nvidia_smi("echo 'NVIDIA H200'\n" * num_gpus + ":")
    monkeypatch.chdir(tmp_path)
    here = detect_hardware()
    assert len(here.gpus) == num_gpus
    for name, _ in STEPS:
        plan = make_plan(load_recipe(name, process_overrides(here)), DeviceRequest(), here, None)
        check_machine(plan.topology, here)
        assert (plan.topology.device, plan.topology.world_size) == (device, processes)
        assert plan.batch.packs_per_step == 4, "the batch of a step is the same on every machine"
