"""Early stopping and the best checkpoint: the validation loss decides, whatever engine, kill or stop came between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_engines import write_base

from cli import metrics, packhorse
from packhorse.cli.status import status
from packhorse.errors import EXIT_STOPPED, UserError
from packhorse.plan.run_plan import read_plan
from packhorse.workflows.resume_run import refuse_finished
from ranks import planned, run_ranks, to_the_end, trained
from tiny import write_tiny

FEW_ROWS = {"sources": [{"path": "builtin:core.messages.jsonl", "rows": 60}]}
MEASURED = ("train/loss", "train/grad_norm", "train/learning_rate", "evaluation/loss")


def overfitting(folder: Path, **sections: Any) -> Path:
    """A recipe whose validation loss is lowest at step 8 of 20 and then rises; it stops early at step 14."""
    return write_tiny(
        folder,
        **{
            "data": FEW_ROWS,
            "steps": 20,
            "batch": {"length": 256, "packs": 4},
            "optimizer": {"learning_rate": 5e-2},
            "evaluation": {"every_steps": 2, "early_stopping": {"patience": 3}, "max_answered_rows": 0},
            "checkpoint": {"every_steps": 2, "keep_last": 9, "publish": "best"},
            **sections,
        },
    )


def losses(run: Path) -> dict[int, float]:
    """Validation loss by step, without step 0."""
    return {line["step"]: line["evaluation/loss"] for line in metrics(run)[1:] if "evaluation/loss" in line}


def stopped_early(run: Path, patience: int) -> tuple[int, int]:
    """Check by the curve alone that a run ended where it should; its best step and its last one."""
    measured = losses(run)
    steps = list(measured)
    best = min(measured, key=lambda step: measured[step])
    assert steps[-1] == steps[steps.index(best) + patience] < 20, measured
    assert metrics(run)[-1]["step"] == steps[-1], "no step is made after the last evaluation"
    state = json.loads((run / "status.json").read_text())
    assert (state["state"], state["step"]) == ("finished", steps[-1])
    assert f"stopped early at step {steps[-1]}" in state["message"]
    assert f"in {patience} evaluations since step {best} " in state["message"]
    return best, steps[-1]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="single"),
        pytest.param(("parallel.engine=fsdp2", "parallel.processes=2"), id="fsdp2"),
    ],
)
def test_killed_and_stopped_it_ends_where_an_unbroken_run_does(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = overfitting(tmp_path)
    unbroken = trained(recipe, "unbroken", *words)
    best, last = stopped_early(unbroken, 3)
    check_published(unbroken, "model", torch.float32, best)
    run = planned(recipe, "broken", *words)
    run_ranks(run, "kill@11:0")
    # During the evaluation that comes before the last, then during the last one, whose repetition ends the run.
    for attempt, fault in ((2, f"term-evaluate@{last - 2}:0:2"), (3, f"term-evaluate@{last}:0:3")):
        assert {record["exit_code"] for record in run_ranks(run, fault, attempt)} == {EXIT_STOPPED}
    to_the_end(run, attempt=4)
    for one, other in zip(metrics(run), metrics(unbroken), strict=True):
        assert [one.get(key) for key in MEASURED] == [other.get(key) for key in MEASURED], one["step"]
    for file in ("model.safetensors", "result.json"):
        assert (run / "model" / file).read_bytes() == (unbroken / "model" / file).read_bytes()
    assert stopped_early(run, 3) == (best, last)
    with pytest.raises(UserError, match=rf"is finished: {last} of 20 steps are done; it stopped early"):
        refuse_finished(read_plan(run))
    monkeypatch.setenv("COLUMNS", "200")
    status(str(run))
    shown = capsys.readouterr().out
    assert f"step {best} of {last}: the checkpoint with the lowest validation loss" in shown
    assert "finished: stopped early" in shown
    assert f"since step {best} (epoch " in shown, "it overfits"


@pytest.mark.parametrize(
    ("words", "kind", "dtype"),
    [
        pytest.param(("method=lora",), "adapter", torch.float32, id="single lora"),
        pytest.param(
            ("parallel.engine=zero3", "parallel.processes=2", "precision=bf16"), "model", torch.bfloat16, id="zero3"
        ),
    ],
)
def test_the_best_checkpoint_is_published(
    words: tuple[str, ...], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """After a launch by `accelerate`; under zero3 in bf16 from float32 master weights."""
    recipe = overfitting(tmp_path, model=write_base(tmp_path))
    done = packhorse(tmp_path, "train", recipe.name, *words)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"
    best, last = stopped_early(run, 3)
    assert f"stopped early at step {last}" in done.err
    check_published(run, kind, dtype, best)


def check_published(run: Path, kind: str, dtype: torch.dtype, best: int) -> None:
    """The result holds the weights of the best checkpoint, rounded, and of no other checkpoint."""
    file = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}[kind]
    published = load_file(run / kind / file)
    same = []
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        stored = load_file(checkpoint / kind / file)
        assert stored.keys() == published.keys()
        if all(torch.equal(published[name], stored[name].to(dtype)) for name in stored):
            same.append(int(checkpoint.name[-6:]))
    assert same == [best]
    assert json.loads((run / kind / "result.json").read_text())["step"] == best
