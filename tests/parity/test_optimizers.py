"""The other optimizers: the curves of torch's own classes, and of Lion written out from its paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from committed import committed_curve
from laboratory import RUN_STEPS, Laboratory
from launches import ENGINES, train_forked

from cli import curve
from golden import METHODS, Curve, adafactor, lion, muon, trajectory


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of the recipe beside its oracle.

    Attributes:
        words: Overrides of the recipe.
        make: The same by hand.
        learning_rate: Of both.
        tolerance: Largest relative difference of a loss.
    """

    words: tuple[str, ...]
    make: Callable[..., object]
    learning_rate: float
    tolerance: float


OPTIMIZERS = {
    # A sign turns where a running mean is rounded to either side of 0, and the weight then goes the other way.
    "lion": Optimizer(("optimizer.betas=[0.9,0.99]",), lion, 5e-4, 1e-4),
    "adafactor": Optimizer((), adafactor, 1e-2, 1e-5),
    # torch's Newton-Schulz iteration runs in bfloat16, whatever the precision.
    "muon": Optimizer((), muon, 2e-3, 1e-3),
}


def golden_of(name: str, laboratory: Laboratory) -> Curve:
    """The optimizer's own curve."""
    chosen = OPTIMIZERS[name]

    def compute() -> Curve:
        return trajectory(METHODS["full"], laboratory.start("tiny", "none"), chosen.make, chosen.learning_rate)

    return committed_curve(name, laboratory.fingerprint("tiny"), compute)


CELLS = [
    pytest.param("lion", "ddp x 2", marks=pytest.mark.matrix),
    pytest.param("lion", "zero2 x 2"),
    pytest.param("lion", "zero3 x 2", marks=pytest.mark.matrix),
    pytest.param("adafactor", "ddp x 2", marks=pytest.mark.matrix),
    pytest.param("muon", "ddp x 2", marks=pytest.mark.matrix),
    pytest.param("muon", "fsdp2 x 2", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_the_curve_is_the_optimizers_own(name: str, engine: str, laboratory: Laboratory) -> None:
    chosen = OPTIMIZERS[name]
    golden = golden_of(name, laboratory)
    assert golden.losses[-1] < 0.99 * golden.untrained
    run = train_forked(
        laboratory.recipe("full", "tiny", "none"),
        ENGINES[engine],
        f"{name}-{engine}".replace(" ", "-"),
        f"optimizer.name={name}",
        f"optimizer.learning_rate={chosen.learning_rate}",
        *chosen.words,
    )
    assert curve(run) == pytest.approx(golden.first(RUN_STEPS).losses, rel=chosen.tolerance, abs=0)
