"""SIGKILL at random moments: the run comes back by itself, and ends as if it had never been touched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chaos import Weather, differences, trained
from tiny import write_tiny

SAVE_EVERY = 2
WORDS = ("parallel.processes=2", "recovery.restarts=1000")
KILLS = ("kill_rank", "kill_ranks", "kill_launcher", "kill_all")


def a_moment(draw: random.Random) -> float:
    """Seconds into the steps, or (negative) into the start."""
    return -draw.uniform(0.5, 6) if draw.random() < 0.15 else draw.uniform(0, 1)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_killed_at_random_moments_it_ends_as_if_it_had_never_been(tmp_path: Path, asynchronous: bool) -> None:
    checkpoint = {"every_steps": SAVE_EVERY, "asynchronous": asynchronous}
    write_tiny(tmp_path, steps=500, checkpoint=checkpoint, evaluation={"every_steps": 50, "exact_match_rows": 0})
    trained(tmp_path, ["tiny.yaml", "name=unbroken", *WORDS])
    weather = Weather(tmp_path, "tiny.yaml", "killed", WORDS, seed=7 + asynchronous)
    draw = random.Random(asynchronous)
    report = weather.pass_over([draw.choice(KILLS) for _ in range(11)], a_moment, seconds=900)
    assert report.exit_code == 0, report.tail
    assert sum(report.faults.values()) == 11, "the run ended before all faults had struck: let it make more steps"
    assert differences(weather.run, tmp_path / "runs" / "unbroken") == []
    # While one checkpoint is being written the one before it is the newest.
    assert max(report.lost) <= SAVE_EVERY * (1 + asynchronous), report.lost
