"""What all ranks agree on between two steps: whether to stop or to save, in one small sum on the CPU.

Asked by signals to any rank, or by hand: `touch RUN/STOP` ends the run as a signal would, `touch RUN/CHECKPOINT` saves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from packhorse.run_folder.layout import CHECKPOINT_FILE, STOP_FILE
from packhorse.train.engine.engine import Engine
from packhorse.train.ranks.signals import Stopped, StopRequest

LOOK_SECONDS = 1.0
"""Between two looks for these files: on a shared file system a look is a message to a server."""


@dataclass(frozen=True)
class Agreed:
    """The same on every rank.

    Attributes:
        stop: Some rank was asked to stop.
        checkpoint: A checkpoint was asked for.
        written: Every rank has brought its part of the checkpoint that is being written to disk.
        loss_sum: Of the token losses of the step, over all ranks; no number where one rank's is none.
        num_bad_ranks: Ranks whose gradient norm is no number.
    """

    stop: bool = False
    checkpoint: bool = False
    written: bool = False
    loss_sum: float = 0.0
    num_bad_ranks: int = 0


class Agreement:
    """Asks all ranks; every method that takes the engine is a collective."""

    def __init__(
        self, signals: StopRequest, run_folder: Path, is_main: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._signals = signals
        self._files = {name: run_folder / name for name in (STOP_FILE, CHECKPOINT_FILE)}
        self._is_main = is_main
        self._clock = clock
        self._looked = -LOOK_SECONDS
        self._seen: set[str] = set()

    def between_steps(self, engine: Engine, written: bool = True) -> Agreed:
        """What is asked of the run; `written`: this rank has nothing more to write."""
        return self._sum(engine, written, 0.0, 0.0)

    def after_step(self, engine: Engine, losses: list[Tensor], grad_norm: float, written: bool = True) -> Agreed:
        """The same, and what came of the step in the same sum.

        Args:
            engine: Of this rank.
            losses: Sums of this rank's token losses.
            grad_norm: Of the whole gradient, as this rank knows it.
            written: This rank has nothing more to write.
        """
        bad = not math.isfinite(grad_norm) and not engine.step_was_skipped
        return self._sum(engine, written, float(torch.stack(losses).double().sum()), bad)

    def _sum(self, engine: Engine, written: bool, loss_sum: float, bad: float) -> Agreed:
        self._look()
        stop = self._signals.requested or STOP_FILE in self._seen
        mine = [stop, CHECKPOINT_FILE in self._seen, not written, bad, loss_sum]
        stops, saves, writing, bad_ranks, total = engine.sum_over_ranks(mine)
        return Agreed(stops > 0, saves > 0, written=writing == 0, loss_sum=total, num_bad_ranks=round(bad_ranks))

    def go_on(self, engine: Engine) -> None:
        """Called in long loops that can be done again.

        Raises:
            Stopped: Some rank was asked to stop.
        """
        if self.between_steps(engine).stop:
            raise Stopped

    def saved(self) -> None:
        """Takes CHECKPOINT away once it was acted on, so that it is not acted on again."""
        if self._is_main and CHECKPOINT_FILE in self._seen:
            self._files[CHECKPOINT_FILE].unlink(missing_ok=True)
            self._seen.discard(CHECKPOINT_FILE)

    def _look(self) -> None:
        now = self._clock()
        if self._is_main and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._seen = {name for name, path in self._files.items() if path.exists()}


def stopped(run_folder: Path) -> None:
    """Takes STOP away when the attempt has ended by it, in whatever phase; else the next one would end too."""
    (run_folder / STOP_FILE).unlink(missing_ok=True)
