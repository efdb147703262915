import io

import pytest
from rich.console import Console

from packhorse.track.progress import Bar, Lines, describe, describe_count, describe_duration, open_progress

FIGURES = {"train/loss": 0.41234, "speed/tokens_per_second": 3421.0}


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps_shown(num_steps, seconds_per_step, first_step=0, until=None):
    clock, out = FakeClock(), io.StringIO()
    progress = open_progress(Console(file=out, width=40), num_steps, first_step, clock)
    assert isinstance(progress, Lines)
    for step in range(first_step + 1, (until or num_steps) + 1):
        clock.now += seconds_per_step
        progress.update(step, FIGURES)
    progress.close()
    lines = out.getvalue().splitlines()
    return [int(line.split()[1].split("/")[0]) for line in lines], lines


def test_the_line_reads_as_promised():
    assert describe(0.41234, 3421.0, 72.4) == "loss 0.412 · 3.4k tokens/s · ETA 1 min 12 s"
    _, lines = steps_shown(num_steps=400, seconds_per_step=0.25, until=1)
    assert lines == ["step 1/400 · loss 0.412 · 3.4k tokens/s · ETA 1 min 40 s"]


def test_slow_steps_show_one_line_in_five_percent():
    shown, _ = steps_shown(num_steps=100, seconds_per_step=60.0)
    assert shown == [1, *range(6, 100, 5), 100]


def test_fast_steps_show_one_line_in_ten_seconds():
    shown, _ = steps_shown(num_steps=100, seconds_per_step=1.0)
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_a_run_that_is_stopped_still_shows_its_last_step():
    shown, _ = steps_shown(num_steps=100, seconds_per_step=0.01, until=37)
    assert shown == [1, 37]


def test_time_left_of_a_resumed_run_is_judged_by_its_own_steps():
    _, lines = steps_shown(num_steps=100, seconds_per_step=2.0, first_step=90)
    assert lines[0].endswith("ETA 18 s")


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    progress = open_progress(Console(file=out, width=80, force_terminal=True), 4, 0, FakeClock())
    assert isinstance(progress, Bar)
    for step in range(1, 5):
        progress.update(step, FIGURES)
    progress.close()
    assert "step 4/4" in out.getvalue()
    assert "loss 0.412 · 3.4k tokens/s" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (72, "1 min 12 s"),
        (3600, "1 h"),
        (11100, "3 h 5 min"),
        (90000, "1 d 1 h"),
        (float("inf"), "unknown"),
    ],
)
def test_durations(seconds, text):
    assert describe_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (87.4, "87"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (3421, "3.4k"),
        (99_960, "100k"),
        (120_400, "120k"),
        (1.25e6, "1.2M"),
    ],
)
def test_counts(count, text):
    assert describe_count(count) == text
