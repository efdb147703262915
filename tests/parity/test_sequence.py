"""Packs cut over processes train on the curve of the loop by hand, which has one process and knows no packs."""

from __future__ import annotations

import pytest
from laboratory import RUN_STEPS, Laboratory

from cli import curve, metrics
from golden import assert_norms
from ranks import trained

TOLERANCE = 1e-5

# Four processes are two groups, so each group takes its own packs.
SYSTEMS = {
    "ddp-4": ["parallel.engine=ddp", "parallel.processes=4", "batch.micro=2", "parallel.checkpointing=true"],
    "fsdp2-2": ["parallel.engine=fsdp2", "parallel.processes=2", "batch.micro=8"],
}


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_packs_on_two_processes_each_give_the_golden_curve(system: str, laboratory: Laboratory) -> None:
    recipe = laboratory.recipe("full", "tiny", "mixed")
    run = trained(recipe, system, "parallel.sequence=2", *SYSTEMS[system])
    whole = laboratory.golden("full", "tiny", "mixed")
    golden = whole.first(RUN_STEPS)
    assert curve(run) == pytest.approx(golden.losses, rel=TOLERANCE, abs=0)
    assert_norms(curve(run, "train/grad_norm"), golden)
    assert whole.losses[-1] < whole.losses[0] - 0.05, "the curve must fall, or equal curves say little"
    (proof,) = (line for line in metrics(run) if "proof/sequence_difference" in line)
    assert proof["proof/sequence_difference"] < 1e-5
    # Tokens are counted once, not by each process that holds a part of the pack.
    assert max(curve(run, "data/fill")) <= 1
