"""What all ranks agree on between two steps, exchanged on the CPU: stop, save, the step's loss, a failure of one rank.

A signal to any rank stops the run; `touch RUN/STOP` does the same, and `touch RUN/CHECKPOINT` saves.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from packhorse.errors import UserError
from packhorse.run_folder.layout import CHECKPOINT_FILE, STOP_FILE
from packhorse.train.engine.engine import Engine
from packhorse.train.ranks.signals import Stopped, StopRequest

POLL_SECONDS: Final = 1.0
"""Least time between two checks for the request files: on a shared file system each is a message to a server."""
MAX_TEXT_BYTES: Final = 4096
MAX_REPR: Final = 1000


@dataclass(frozen=True)
class Agreed:
    """What every rank knows after the exchange; equal on all ranks.

    Attributes:
        stop: Some rank was requested to stop.
        checkpoint: A checkpoint was requested.
        written: Every rank has written its part of the current checkpoint to disk.
        loss_sum: Token losses of the step over all ranks; NaN or Inf where one rank's is.
        num_bad_ranks: Ranks whose gradient norm is not finite.
    """

    stop: bool = False
    checkpoint: bool = False
    written: bool = False
    loss_sum: float = 0.0
    num_bad_ranks: int = 0


class Agreement:
    """Exchanges requests and results between ranks; every method that takes the engine is a collective."""

    def __init__(self, signals: StopRequest, run_folder: Path, is_main: bool) -> None:
        self._signals = signals
        self._files = {name: run_folder / name for name in (STOP_FILE, CHECKPOINT_FILE)}
        self._is_main = is_main
        self._polled_at = -math.inf
        self._present: set[str] = set()

    def between_steps(self, engine: Engine, written: bool = True) -> Agreed:
        """Return what was requested of the run; `written`: this rank has nothing more to write."""
        return self._exchange(engine, written, loss_sum=0.0, bad=False)

    def after_step(self, engine: Engine, loss_sum: float, grad_norm: float, written: bool = True) -> Agreed:
        """Return what was requested and the result of the step, with one sum over the ranks.

        `loss_sum` is of this rank's tokens; `grad_norm` is the whole norm as this rank computed it.
        """
        bad = not math.isfinite(grad_norm) and not engine.step_was_skipped
        return self._exchange(engine, written, loss_sum, bad)

    def raise_if_stopped(self, engine: Engine) -> None:
        """Check for a stop request inside a long loop that can be repeated; a collective.

        Raises:
            Stopped: Some rank was requested to stop.
        """
        if self.between_steps(engine).stop:
            raise Stopped

    def saved(self) -> None:
        """Remove RUN/CHECKPOINT once the checkpoint was made, so that the request counts once."""
        if self._is_main and CHECKPOINT_FILE in self._present:
            self._files[CHECKPOINT_FILE].unlink(missing_ok=True)
            self._present.discard(CHECKPOINT_FILE)

    def _exchange(self, engine: Engine, written: bool, loss_sum: float, bad: bool) -> Agreed:
        self._poll_files()
        stop = self._signals.requested or STOP_FILE in self._present
        own = [stop, CHECKPOINT_FILE in self._present, not written, bad, loss_sum]
        stops, saves, writing, bad_ranks, total = engine.sum_over_ranks(own)
        return Agreed(stops > 0, saves > 0, written=writing == 0, loss_sum=total, num_bad_ranks=round(bad_ranks))

    def _poll_files(self) -> None:
        now = time.monotonic()
        if self._is_main and now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            self._present = {name for name, path in self._files.items() if path.exists()}


def remove_stop_request(run_folder: Path) -> None:
    """Remove RUN/STOP after the attempt that it ended, whatever the phase; otherwise the next attempt ends too."""
    (run_folder / STOP_FILE).unlink(missing_ok=True)


def texts_of_ranks(engine: Engine, text: str) -> list[str]:
    """Return the text of each rank, by rank, cut to `MAX_TEXT_BYTES` of UTF-8; a collective on the CPU.

    Sent as bytes, because torch's `all_gather_object` pickles.
    """
    if engine.control is None:
        return [text]
    own = torch.zeros(MAX_TEXT_BYTES, dtype=torch.uint8)
    encoded = text.encode()[:MAX_TEXT_BYTES]
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    received = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(received, own, group=engine.control)
    return [bytes(padded.tolist()).rstrip(b"\0").decode(errors="ignore") for padded in received]


def agreed_failure(engine: Engine, error: Exception | None) -> Exception | None:
    """Share this rank's error with all ranks, so that all react alike; a collective.

    Returns:
        None where no rank failed. Otherwise the user error of the lowest rank that has one, on every rank; for a bug,
        the exception itself where it happened and a RuntimeError that quotes it on the other ranks.
    """
    if not engine.sum_over_ranks([float(error is not None)])[0]:
        return None
    record = json.loads(next(filter(None, texts_of_ranks(engine, _as_json(error)))))
    if error is not None and not isinstance(error, UserError):
        return error  # keeps its traceback
    if "bug" in record:
        return RuntimeError(f"another rank failed: {record['bug']}")
    fact, why, fix = record["mistake"]
    return UserError(fact, why, fix, exit_code=record["exit_code"])


def _as_json(error: Exception | None) -> str:
    if error is None:
        return ""
    if not isinstance(error, UserError):
        return json.dumps({"bug": repr(error)[:MAX_REPR]})
    mistake = error.mistakes[0]
    return json.dumps({"mistake": [mistake.fact, mistake.why, mistake.fix], "exit_code": error.exit_code})
