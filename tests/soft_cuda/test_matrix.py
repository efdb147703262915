"""The worker on soft CUDA: method x engine x precision."""

from __future__ import annotations

import numpy as np
from laboratory import Laboratory
from soft_runs import SoftCuda

from cli import curve


def test_lora_on_one_gpu(cuda: SoftCuda, laboratory: Laboratory) -> None:
    golden = laboratory.golden("lora", "tiny", "none").first(4)
    run = cuda.trained(laboratory.recipe("lora", "tiny", "none"), "one", "precision=bf16", "steps=4")
    assert abs(np.array(curve(run)) / golden.losses - 1).max() < 1e-2
