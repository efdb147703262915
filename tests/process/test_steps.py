"""Launched on 1, 2 and 4 ranks, a run does the steps that its plan counted from the real packs, and then ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import curve
from packhorse.errors import EXIT_OK
from packhorse.plan.run_plan import read_plan
from packhorse.run_folder.status import read_status
from ranks import planned, run_ranks
from tiny import write_tiny

EPOCHS, PACKS = 2, 4


def write_rows(folder: Path) -> Path:
    """Few and short, so that starting is most of the time."""
    path = folder / "rows.jsonl"
    turns = (
        [{"role": "user", "content": f"Add {n} and 1."}, {"role": "assistant", "content": str(n + 1)}]
        for n in range(80)
    )
    path.write_text("".join(f"{json.dumps({'messages': messages})}\n" for messages in turns), encoding="utf-8")
    return path


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_steps_that_were_planned_are_run(world: int, tmp_path: Path) -> None:
    recipe = write_tiny(
        tmp_path,
        data={"sources": [{"path": str(write_rows(tmp_path))}]},
        batch={"length": 128, "packs": PACKS},
        steps=None,
        epochs=EPOCHS,
        track={"wandb": "off", "every_steps": 1},
    )
    run = planned(recipe, f"on-{world}", f"parallel.processes={world}")
    plan = read_plan(run)
    assert plan.data is not None
    assert plan.data.num_packs % PACKS, "the last step of an epoch is short"
    assert plan.num_steps == EPOCHS * -(-plan.data.num_packs // PACKS)
    assert [record["exit_code"] for record in run_ranks(run)] == [EXIT_OK] * world
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step) == ("finished", plan.num_steps)
    assert len(curve(run)) == plan.num_steps
