"""How long before its end a job is told: enough for one step and one measured save."""

from __future__ import annotations

from packhorse.launching.slurm.script import signal_lead


def test_short_steps_get_the_least() -> None:
    lead = signal_lead([], None, None)
    assert lead.seconds == 180
    assert lead.reason == "neither step nor save is known, 120 s at least, and 60 s to end"


def test_the_longest_step_and_save_of_earlier_attempts_count() -> None:
    lines = [
        {"step": 1, "speed/step_seconds": 30.0},
        {"step": 2, "speed/step_seconds": 45.0, "checkpoint/seconds": 500.0},
        {"step": 3, "speed/step_seconds": 20.0, "checkpoint/seconds": 400.5},
    ]
    lead = signal_lead(lines, 1.0, 10**9)
    assert lead.seconds == 45 + 500 + 60
    assert lead.reason == "a step of 45.0 s and a save of 500.0 s were measured, and 60 s to end"


def test_without_a_measured_save_the_plan_says_how_large_it_is() -> None:
    # A checkpoint of an 8B model with Adam in float32 is 96 GB: eight minutes at 200 MB/s.
    lead = signal_lead([], 20.0, 96 * 10**9)
    assert lead.seconds == 20 + 480 + 60
    assert "expected" in lead.reason
