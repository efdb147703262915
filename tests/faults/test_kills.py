"""SIGKILL at random moments: the run comes back by itself, and ends as if it had never been touched."""

from __future__ import annotations

import random
from pathlib import Path

from chaos import Weather, differences
from ranks import trained
from tiny import write_tiny

SAVE_EVERY = 2
WORDS = ("parallel.processes=2", "recovery.restarts=1000")
KILLS = ("kill_rank", "kill_ranks", "kill_launcher", "kill_all")


def a_moment(draw: random.Random) -> float:
    """Seconds into the steps, or (negative) into the start."""
    return -draw.uniform(0.5, 6) if draw.random() < 0.15 else draw.uniform(0, 1)


def test_killed_at_random_moments_it_ends_as_if_it_had_never_been(tmp_path: Path) -> None:
    """Each kind once, checkpoints written beside training; `make chaos` has two hundred, half of them in turn."""
    checkpoint = {"every_steps": SAVE_EVERY, "asynchronous": True}
    evaluation = {"every_steps": 50, "max_answered_rows": 0}
    recipe = write_tiny(tmp_path, steps=200, checkpoint=checkpoint, evaluation=evaluation)
    unbroken = trained(recipe, "unbroken", *WORDS)
    weather = Weather(tmp_path, "tiny.yaml", "killed", WORDS, seed=8)
    report = weather.pass_over(random.Random(1).sample(KILLS, len(KILLS)), a_moment, seconds=900)
    assert report.exit_code == 0, report.tail
    assert sum(report.faults.values()) == len(KILLS), "the run ended before all had struck: let it make more steps"
    assert differences(weather.run, unbroken) == []
    # While one checkpoint is being written the one before it is the newest.
    assert max(report.lost) <= 2 * SAVE_EVERY, report.lost
