"""One recipe, one curve: method by method, whatever shards the model and however the step is cut.

`make test` runs the cells that hold each pair of settings, `make parity` those that hold each three of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from committed import read_file, versions
from covering import Cell, allowed_cells, combinations_of, covering_array
from laboratory import PACKS, RUN_STEPS, Laboratory
from launches import ENGINES, train, train_forked

from cli import curve
from golden import METHODS, Curve, assert_norms

LOSS_TOLERANCE = 1e-5
# The loop by hand, with its weights changed by 1e-7 at random, has losses that differ from its own by up to 3.9e-7 in
# the mean, of one sign (full, stories260K: 7.7 standard errors): as much is not told from rounding.
NOISE = 5e-7


FACTORS = {
    "method": tuple(METHODS),
    "base": ("fresh", "tiny", "stories260K"),
    "engine": tuple(ENGINES),
    "passes": ("1 pass", "4 passes"),
    "checkpointing": ("off", "every layer", "every 2nd layer", "all but attention"),
    "packing": ("mixed", "none"),
}
CHECKPOINTING = {"off": "false", "every layer": "true", "every 2nd layer": "2", "all but attention": "selective"}


def _can_be(cell: Cell) -> bool:
    if cell["checkpointing"] == "all but attention" and ENGINES[cell["engine"]].name == "zero3":
        return False  # refused
    # An adapter beside random weights is refused, and 8-bit weights where an engine would have to shard them.
    if cell["base"] == "fresh":
        return cell["method"] == "full"
    return cell["method"] != "int8" or ENGINES[cell["engine"]].name not in {"zero3", "fsdp2"}


def _in_share(cell: Cell) -> bool:
    # Start-up is most of a cell, and four processes on two cores take four times as long. What no engine sees stands
    # under one of them: the kernels of fp4 and int8, where fresh weights come from.
    if cell["method"] in {"fp4", "int8"}:
        return [cell[name] for name in FACTORS if name != "method"] == ["tiny", "zero2 x 2", "4 passes", "off", "mixed"]
    if cell["base"] == "fresh":
        return cell["engine"] == "single"
    return cell["engine"] != "zero3 x 4" or (cell["method"], cell["base"], cell["checkpointing"]) == (
        "full",
        "tiny",
        "every 2nd layer",
    )


CELLS = allowed_cells(FACTORS, _can_be)
SHARED_CELLS = [cell for cell in CELLS if _in_share(cell)]
SHARE = covering_array(SHARED_CELLS, 2)
# Keeping attention's results makes no kernel run that recomputation of every layer does not: pairs are enough.
LONG_CELLS = [cell for cell in CELLS if cell["checkpointing"] != "all but attention"]
REST = covering_array(LONG_CELLS, 3, beside=SHARE)


def _id(cell: Cell) -> str:
    return ", ".join(cell.values())


LAUNCHED = [next(cell for cell in SHARE if cell["engine"] == name) for name in ENGINES if name != "zero3 x 4"]
"""A cell of each engine is typed as a user types it; the others spare the seconds in which a launch imports torch."""

MATRIX = [pytest.param(cell, id=_id(cell)) for cell in SHARE] + [
    pytest.param(cell, id=_id(cell), marks=pytest.mark.matrix) for cell in REST
]


def test_the_share_holds_every_pair_of_settings_and_the_matrix_every_three() -> None:
    for strength, chosen, cells in ((2, SHARE, SHARED_CELLS), (3, SHARE + REST, LONG_CELLS)):
        held, wanted = (set().union(*(combinations_of(c, strength) for c in group)) for group in (chosen, cells))
        assert wanted <= held
    assert all(_can_be(cell) for cell in SHARE + REST)


def test_the_committed_curves_are_those_of_the_pinned_libraries() -> None:
    assert read_file()["versions"] == versions(), "write them again: python tests/parity/committed.py"


@pytest.mark.parametrize("cell", MATRIX)
def test_the_curve_is_the_one_of_the_loop_by_hand(cell: Cell, laboratory: Laboratory) -> None:
    golden = laboratory.golden(cell["method"], cell["base"], cell["packing"])
    assert golden.losses[-1] < 0.995 * golden.untrained, "where nothing is learnt, equal curves say little"
    run = _train(laboratory, cell)
    losses, norms = curve(run), curve(run, "train/grad_norm")
    assert len(losses) == RUN_STEPS
    golden = golden.first(RUN_STEPS)
    _record(cell, golden, losses, norms)
    assert losses == pytest.approx(golden.losses, rel=LOSS_TOLERANCE, abs=0)
    assert_norms(norms, golden)
    assert not _drifts(losses, golden.losses)


def _train(laboratory: Laboratory, cell: Cell) -> Path:
    """Runs the cell's recipe under its engine; the run folder."""
    engine = ENGINES[cell["engine"]]
    share = PACKS // engine.processes
    passes = min(share, int(cell["passes"].split()[0]))
    run = train if cell in LAUNCHED else train_forked
    return run(
        laboratory.recipe(cell["method"], cell["base"], cell["packing"]),
        engine,
        _id(cell).replace(", ", "-").replace(" ", "-"),
        f"batch.micro={share // passes}",
        f"parallel.checkpointing={CHECKPOINTING[cell['checkpointing']]}",
    )


def _relative(mine: list[float], golden: list[float]) -> np.ndarray:
    return np.array(mine) / np.array(golden) - 1


def _drifts(mine: list[float], golden: list[float]) -> bool:
    """Whether the differences have one sign: their mean is further from 0 than rounding and three standard errors."""
    differences = _relative(mine, golden)
    return abs(differences.mean()) > max(NOISE, 3 * differences.std(ddof=1) / np.sqrt(len(differences)))


def _record(cell: Cell, golden: Curve, losses: list[float], norms: list[float]) -> None:
    """Adds the cell's figures to the file that `make parity` makes its table of."""
    file = os.environ.get("PARITY_RESULTS")
    if file is None:
        return
    loss, norm = _relative(losses, golden.losses), _relative(norms, golden.norms)
    figures = {"loss": abs(loss).max(), "norm": abs(norm).max(), "mean": loss.mean(), "deviation": loss.std(ddof=1)}
    with Path(file).open("a", encoding="utf-8") as out:
        out.write(json.dumps({"cell": cell, **figures}) + "\n")
