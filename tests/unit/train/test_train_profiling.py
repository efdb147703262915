"""Which steps the profiler records: the window alone, what is left of it after a resume, and what a stop cuts off."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.train.profiling import StepProfiler, step_profiler
from tiny import write_tiny

CPU = torch.device("cpu")
PHASES = ("phase data", "phase forward", "phase backward", "phase optimizer", "phase save")


def train(folder: Path, window: tuple[int, int], first_step: int, last_step: int) -> None:
    """Phases as the step loop begins them, around work of one product per pass."""
    profiler = StepProfiler(folder, *window, rank=0, device=CPU)
    weight = torch.ones(4, 4, requires_grad=True)
    for done in range(first_step - 1, last_step):
        profiler.phase("data", done)
        profiler.phase("forward", None)
        loss = (weight @ weight).sum()
        profiler.phase("backward", None)
        loss.backward()
        profiler.phase("optimizer", None)
        profiler.phase("save", done + 1)
    profiler.close()


def marks(trace: Path) -> list[str]:
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: (event["ts"], -event["dur"]))]


@pytest.mark.parametrize(
    ("window", "steps", "recorded"),
    [
        ((3, 4), (1, 6), (3, 4)),
        ((1, 2), (1, 3), (1, 2)),
        ((6, 6), (1, 6), (6, 6)),
        ((3, 6), (5, 8), (5, 6)),  # resumed from step 4
        ((3, 6), (1, 4), (3, 4)),  # stopped after step 4
    ],
    ids=["inside", "from the first step", "the last step", "partly past", "cut off"],
)
def test_the_trace_holds_the_steps_of_the_window_with_their_phases(
    window: tuple[int, int], steps: tuple[int, int], recorded: tuple[int, int], tmp_path: Path
) -> None:
    train(tmp_path, window, *steps)
    files = list((tmp_path / "profile").iterdir())
    assert [file.name for file in files] == [f"steps-{recorded[0]}-{recorded[1]}-rank-0.json.gz"]
    expected = [mark for step in range(recorded[0], recorded[1] + 1) for mark in (f"step {step}", *PHASES)]
    assert marks(files[0]) == expected


@pytest.mark.parametrize("steps", [(5, 8), (1, 2), (1, 1)], ids=["past", "before", "long before"])
def test_an_attempt_outside_the_window_writes_nothing(steps: tuple[int, int], tmp_path: Path) -> None:
    train(tmp_path, (3, 4), *steps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("profile", "ranks"), [("null", []), ("{steps: [1, 2]}", [0]), ("{steps: [1, 2], all_ranks: true}", [0, 1, 2])]
)
def test_rank_0_alone_is_recorded_unless_all_are_requested(profile: str, ranks: list[int], tmp_path: Path) -> None:
    recipe = load_recipe(str(write_tiny(tmp_path)), [f"track.profile={profile}"])
    plan = make_plan(recipe, DeviceRequest(), Hardware(2, ()), None)
    assert [rank for rank in range(3) if step_profiler(plan, rank, CPU) is not None] == ranks


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file where the folder belongs", encoding="utf-8")
    train(tmp_path, (1, 1), 1, 2)
    assert "cannot be written (File exists); training continues." in caplog.text
