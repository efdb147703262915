"""Three ranks share eight packs: null packs complete the step, and the curve stays that of the loop by hand."""

from __future__ import annotations

import pytest
from laboratory import PACKS, RUN_STEPS, Laboratory
from launches import Engine, train_forked

from cli import curve
from packhorse.plan.run_plan import read_plan

TOLERANCE = 1e-5


def test_ranks_that_do_not_divide_the_packs_learn_the_same(laboratory: Laboratory) -> None:
    golden = laboratory.golden("full", "fresh", "mixed").first(RUN_STEPS)
    # One pack a pass: one rank has a pass of nothing but a null pack.
    run = train_forked(laboratory.recipe("full", "fresh", "mixed"), Engine("ddp", 3), "on-3", "batch.micro=1")
    assert read_plan(run).batch.num_null_packs(3) == 3 * 3 - PACKS
    assert curve(run) == pytest.approx(golden.losses, rel=TOLERANCE, abs=0)
    assert curve(run, "train/grad_norm") == pytest.approx(golden.norms, rel=1e-3)
