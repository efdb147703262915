"""The meter against sums done by hand on a clock that only moves when told."""

import math
from pathlib import Path

import pytest

from packhorse.track.meter import Meter, evaluation_figures, resident_peak_bytes


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run_step(meter, clock, *, data=0.0, compute=0.0, tokens=90, supervised=30, slots=100):
    with meter.data():
        clock.now += data
    clock.now += compute
    meter.count_step(tokens, supervised, slots)


def read(meter, **changes):
    return meter.read(**{"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 0.1, **changes})


def test_interval_of_two_steps_is_split_into_data_compute_and_other():
    clock = FakeClock()
    meter = Meter(clock=clock)
    run_step(meter, clock, data=1.0, compute=3.0)
    run_step(meter, clock, data=0.0, compute=2.0)
    with meter.other():
        clock.now += 10.0
    clock.now += 4.0  # loss.item() waits for the device: that is compute
    figures = read(meter)
    assert figures["speed/step_seconds"] == 20.0 / 2
    assert figures["speed/data_seconds"] == 1.0 / 2
    assert figures["speed/compute_seconds"] == 9.0 / 2
    assert figures["speed/other_seconds"] == 10.0 / 2
    assert figures["speed/tokens_per_second"] == 180 / 10.0
    assert figures["speed/supervised_tokens_per_second"] == 60 / 10.0
    assert figures["data/fill"] == 0.9
    assert figures["time/elapsed_seconds"] == 20.0


def test_a_reading_starts_a_new_interval_but_not_a_new_run():
    clock = FakeClock()
    meter = Meter(clock=clock)
    run_step(meter, clock, data=5.0, compute=5.0)
    read(meter)
    run_step(meter, clock, data=0.0, compute=2.0, tokens=50, supervised=7)
    figures = read(meter)
    assert figures["speed/step_seconds"] == 2.0
    assert figures["speed/data_seconds"] == 0.0
    assert figures["speed/tokens_per_second"] == 25.0
    assert figures["train/supervised_tokens"] == 37
    assert figures["time/elapsed_seconds"] == 12.0


def test_a_resumed_run_goes_on_counting():
    clock = FakeClock()
    meter = Meter(supervised_tokens=1000, elapsed_seconds=60.0, clock=clock)
    run_step(meter, clock, compute=2.0, supervised=5)
    figures = read(meter)
    assert figures["train/supervised_tokens"] == 1005
    assert figures["time/elapsed_seconds"] == 62.0
    assert figures["speed/step_seconds"] == 2.0


def test_keys_are_the_promised_ones():
    clock = FakeClock()
    meter = Meter(clock=clock)
    run_step(meter, clock, compute=1.0)
    assert set(read(meter)) | set(evaluation_figures(1.0)) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/epoch",
        "train/supervised_tokens",
        "speed/tokens_per_second",
        "speed/supervised_tokens_per_second",
        "speed/step_seconds",
        "speed/data_seconds",
        "speed/compute_seconds",
        "speed/other_seconds",
        "data/fill",
        "memory/peak_bytes",
        "evaluation/loss",
        "evaluation/perplexity",
        "time/elapsed_seconds",
    }


def test_reading_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one counted step"):
        read(Meter())


def test_memory_is_the_callers_or_that_of_the_process():
    clock = FakeClock()
    meter = Meter(clock=clock)
    run_step(meter, clock, compute=1.0)
    assert read(meter, peak_bytes=123)["memory/peak_bytes"] == 123
    held = bytearray(64 * 2**20)
    peak = resident_peak_bytes()
    with Path("/proc/self/status").open(encoding="ascii") as status:
        kernel = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    assert len(held) < peak
    assert peak == pytest.approx(kernel, rel=0.05)


def test_perplexity_is_the_exponential_and_never_an_overflow():
    assert evaluation_figures(2.0) == {"evaluation/loss": 2.0, "evaluation/perplexity": pytest.approx(7.389056)}
    assert evaluation_figures(1e4)["evaluation/perplexity"] == math.inf
    assert math.isnan(evaluation_figures(math.nan)["evaluation/perplexity"])
