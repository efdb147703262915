"""bf16: near the fp32 curve on every engine, and no nearer than what the engine keeps in 16 bit lets it be.

single, ddp, fsdp2   trained weights stay float32 and matrix products round their inputs to bfloat16
zero1, zero2, zero3  the weights themselves are rounded to bfloat16, beside float32 masters that are stepped
adapters             float32, beside frozen weights stored in bfloat16

A bfloat16 has 8 bits of precision: one rounding moves a number by up to 2^-9 = .2 %, the logits of a small model by
about as much, and steps do not add them up, since the masters are float32. A norm squares the rounded gradients.
"""

from __future__ import annotations

import numpy as np
import pytest
from laboratory import RUN_STEPS, Laboratory
from launches import ENGINES, train_forked

from cli import curve

LOSS_TOLERANCE = 1e-2
MEAN_TOLERANCE = 2e-3
NORM_TOLERANCE = 5e-2

CELLS = [
    pytest.param("full", "ddp x 2", marks=pytest.mark.matrix),
    pytest.param("full", "zero1 x 2", marks=pytest.mark.matrix),
    pytest.param("full", "zero2 x 2"),
    pytest.param("full", "zero3 x 2", marks=pytest.mark.matrix),
    pytest.param("full", "fsdp2 x 2"),
    pytest.param("lora", "ddp x 2"),
    pytest.param("lora", "zero2 x 2", marks=pytest.mark.matrix),
    pytest.param("lora", "zero3 x 2"),
    pytest.param("lora", "fsdp2 x 2", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("method", "engine"), CELLS)
def test_the_curve_stays_near_the_one_in_fp32(method: str, engine: str, laboratory: Laboratory) -> None:
    golden = laboratory.golden(method, "tiny", "none").first(RUN_STEPS)
    recipe = laboratory.recipe(method, "tiny", "none")
    run = train_forked(recipe, ENGINES[engine], f"{method}-{engine}-bf16".replace(" ", "-"), "precision=bf16")
    losses = np.array(curve(run)) / golden.losses - 1
    norms = np.array(curve(run, "train/grad_norm")) / golden.norms - 1
    assert abs(losses).max() < LOSS_TOLERANCE
    assert abs(losses.mean()) < MEAN_TOLERANCE
    assert abs(norms).max() < NORM_TOLERANCE
    assert abs(losses).max() > 1e-5, "no rounding is seen: this did not run in bf16"
