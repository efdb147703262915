"""How often a step makes the host wait for the device: kernels that are queued meanwhile would run without a gap."""

from __future__ import annotations

from collections import Counter

import pytest
from laboratory import Laboratory
from soft_runs import SoftCuda
from soft_waits import waits_of

STEP_PHASES = ("data", "forward", "backward", "optimizer")
# Waits of one step: losses and gradient norm together. None in a pass, hence none per layer or micro-batch.
PER_STEP = {"single": 1, "fsdp2": 1}


@pytest.mark.parametrize("engine", PER_STEP)
def test_a_step_waits_for_the_device_only_between_its_passes_and_the_next_step(
    engine: str, cuda: SoftCuda, laboratory: Laboratory
) -> None:
    words = [f"parallel.engine={engine}", f"parallel.processes={1 if engine == 'single' else 2}"]
    recipe = laboratory.recipe("lora", "tiny", "none")
    run = cuda.trained(recipe, f"waits-{engine}", "precision=bf16", "steps=3", "batch.micro=1", *words)
    waits = [wait for wait in waits_of(run) if wait.step == 1 and wait.phase in STEP_PHASES]
    assert Counter(wait.phase for wait in waits) == {"optimizer": PER_STEP[engine]}, waits
