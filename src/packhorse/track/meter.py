"""Measures the step loop: times and counts of the steps since the last reading, as one flat set of figures.

metrics.jsonl, W&B, TensorBoard and `packhorse status` use the same keys.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Figures = dict[str, float]
"""Metric key, with its unit in the name, to value."""

Clock = Callable[[], float]
"""Seconds from any fixed moment."""


class Meter:
    """Sums times and counts of optimizer steps; never waits for the device.

    Time outside `data()` and `other()` counts as compute, including the wait for the device that `loss.item()` causes
    just before `read`.

    Attributes:
        supervised_tokens: Supervised tokens learnt from since the run began, over all ranks.
    """

    def __init__(
        self,
        supervised_tokens: int = 0,
        elapsed_seconds: float = 0.0,
        clock: Clock = time.perf_counter,
        utilisation: Callable[[float], Figures] = lambda tokens_per_second: {},
    ) -> None:
        """Start the clock.

        Args:
            supervised_tokens: Supervised tokens of earlier attempts of this run.
            elapsed_seconds: Seconds of earlier attempts of this run.
            clock: Source of the time.
            utilisation: Returns MFU and HFU of a rate in tokens per second over all ranks.
        """
        self._utilisation = utilisation
        self.supervised_tokens = supervised_tokens
        self._clock = clock
        self._run_start = clock() - elapsed_seconds
        self._start_interval()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds that the run has taken, over all attempts."""
        return self._clock() - self._run_start

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time the wait for the next step's batches."""
        start = self._clock()
        yield
        self._data_seconds += self._clock() - start

    @contextmanager
    def other(self) -> Iterator[None]:
        """Time evaluation and checkpoints, which are no part of a step."""
        start = self._clock()
        yield
        self._other_seconds += self._clock() - start

    def count_step(self, num_tokens: int, num_supervised_tokens: int, num_slots: int) -> None:
        """Count one optimizer step, over all ranks.

        Args:
            num_tokens: Real tokens.
            num_supervised_tokens: Labels that are not -100.
            num_slots: Packs × T, the capacity of the packs.
        """
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._num_supervised_tokens += num_supervised_tokens
        self._num_slots += num_slots
        self.supervised_tokens += num_supervised_tokens

    def read(
        self, loss: float, learning_rate: float, grad_norm: float, epoch: float, peak_bytes: int | None = None
    ) -> Figures:
        """Return the figures of the interval since the last reading, and start the next one.

        Seconds are means over the interval's steps; step = data + compute + other. Tokens per second exclude `other`,
        so that an evaluation does not look like a slow step.

        Args:
            loss: Nats per supervised token.
            learning_rate: Learning rate of the last step.
            grad_norm: Gradient norm before clipping.
            epoch: Passes over the rows so far, with fraction.
            peak_bytes: Peak of the accelerator's memory; None for this process's peak of resident memory.

        Raises:
            ValueError: No step was counted since the last reading.
        """
        if self._num_steps == 0:
            raise ValueError("a reading needs at least one counted step")
        now = self._clock()
        total_seconds = now - self._interval_start
        busy_seconds = total_seconds - self._other_seconds
        figures = {
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/epoch": epoch,
            "train/supervised_tokens": self.supervised_tokens,
            "speed/tokens_per_second": self._num_tokens / busy_seconds,
            "speed/supervised_tokens_per_second": self._num_supervised_tokens / busy_seconds,
            "speed/step_seconds": total_seconds / self._num_steps,
            "speed/data_seconds": self._data_seconds / self._num_steps,
            "speed/compute_seconds": (busy_seconds - self._data_seconds) / self._num_steps,
            "speed/other_seconds": self._other_seconds / self._num_steps,
            "data/fill": self._num_tokens / self._num_slots,
            "memory/peak_bytes": resident_peak_bytes() if peak_bytes is None else peak_bytes,
            "time/elapsed_seconds": now - self._run_start,
        }
        self._start_interval(now)
        return figures | self._utilisation(figures["speed/tokens_per_second"])

    def _start_interval(self, now: float | None = None) -> None:
        self._interval_start = self._clock() if now is None else now
        self._data_seconds = self._other_seconds = 0.0
        self._num_steps = self._num_tokens = self._num_supervised_tokens = self._num_slots = 0


def evaluation_figures(loss: float) -> Figures:
    """Return the figures of an evaluation by a loss in nats per supervised token; perplexity is exp(loss)."""
    return {"evaluation/loss": loss, "evaluation/perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def resident_peak_bytes() -> int:
    """Return this process's peak of resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, except on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
