"""Faults at random moments of a run that starts again by itself, and what is to be equal to a run without any."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from cli import PACKHORSE, environment, metrics
from packhorse.run_folder.attempts import AttemptRecord, made_steps, read_attempts
from packhorse.run_folder.checkpoints.listing import complete_checkpoints
from packhorse.run_folder.heartbeat import Heartbeat, read_heartbeats

RANKS = 2
# Learnt or decided, not timed: these must be the same to the last bit.
MEASURED = ("train/loss", "train/grad_norm", "train/learning_rate", "evaluation/loss")
WORKING = {"data", "forward", "backward", "optimizer", "save", "evaluate"}


@dataclass
class Report:
    """What happened to a run.

    Attributes:
        faults: How often each kind struck.
        attempts: As the run recorded them.
        lost: Steps between where an attempt ended and where the next began, for each attempt that worked.
        num_steps: Of the whole run.
        seconds: From the first fault's run's start to its end.
        exit_code: Of the last launcher.
        tail: Its last words.
    """

    faults: Counter[str] = field(default_factory=Counter)
    attempts: Sequence[AttemptRecord] = ()
    lost: list[int] = field(default_factory=list)
    num_steps: int = 0
    seconds: float = 0.0
    exit_code: int = -1
    tail: str = ""

    @property
    def effective_ratio(self) -> float:
        """Steps of the run ÷ steps that were made: ETTR counted over steps."""
        return self.num_steps / made_steps(self.attempts)


class Weather:
    """Runs `packhorse train` as a scheduler would: whatever ends the launcher, it is started again."""

    def __init__(self, folder: Path, recipe: str, name: str, words: Sequence[str], seed: int) -> None:
        self.run = folder / "runs" / name
        self._folder = folder
        self._first = ("train", recipe, f"name={name}", *words)
        self._again = ("train", str(self.run), "--resume", "--restarts", "1000")
        self._asked = folder / f"{name}.fault"
        self._draw = random.Random(seed)
        self._report = Report()

    def pass_over(
        self, strikes: Sequence[str], wait: Callable[[random.Random], float], seconds: float, from_strike: bool = False
    ) -> Report:
        """Strikes while the run lasts, then lets it end.

        Args:
            strikes: Kinds of faults in the order in which they come; a method each.
            wait: How long to wait before the next, seconds, once the ranks work; below 0: at once, working or not.
            seconds: The run must end within this time.
            from_strike: These seconds count from the strike before, the start of the ranks among them.
        """
        began = struck = time.monotonic()
        launcher = self._start(self._first)
        left = list(strikes)
        while launcher.poll() is None or launcher.returncode not in (0, 2):
            assert time.monotonic() - began < seconds, "the run did not end in time"
            if launcher.poll() is not None:
                self._report.tail = self._said()
                launcher = self._start(self._again)
            elif left and self._wait_for_work(launcher, wait(self._draw), struck if from_strike else None):
                struck = time.monotonic()
                attempt = self._attempts()
                if getattr(self, f"_{left[0]}")(launcher):
                    self._report.faults[left.pop(0)] += 1
                    self._wait_for_the_next(launcher, attempt)
            else:
                time.sleep(0.1)
        self._report.exit_code = launcher.wait()
        self._report.tail = self._said()
        self._report.seconds = time.monotonic() - began
        return self._told()

    def _start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        ours = environment("none@-1:0") | {"PACKHORSE_FAULT_FILE": str(self._asked)}
        with (self._folder / "said.log").open("ab") as log:
            return subprocess.Popen(
                [str(PACKHORSE), *words], cwd=self._folder, env=ours, stdout=subprocess.DEVNULL, stderr=log
            )

    def _said(self) -> str:
        return (self._folder / "said.log").read_text(encoding="utf-8")[-2000:]

    def _attempts(self) -> int:
        return len(list((self.run / "logs").glob("attempt-*")))

    def _beats(self) -> list[Heartbeat]:
        """Of the newest attempt."""
        return read_heartbeats(self.run / "logs" / f"attempt-{self._attempts()}")

    def _wait_for_work(self, launcher: subprocess.Popen[bytes], seconds: float, since: float | None) -> bool:
        """Waits until all ranks make steps, and then so long, or until so long after `since`.

        Returns:
            False where the launcher ended.
        """
        if seconds < 0:
            time.sleep(-seconds)
            return launcher.poll() is None
        while launcher.poll() is None:
            beats = self._beats()
            if len(beats) == RANKS and all(beat.phase in WORKING for beat in beats):
                time.sleep(seconds if since is None else max(0.0, since + seconds - time.monotonic()))
                return launcher.poll() is None
            time.sleep(0.02)
        return False

    def _wait_for_the_next(self, launcher: subprocess.Popen[bytes], attempt: int) -> None:
        """Until the fault has ended this attempt."""
        end = time.monotonic() + 180
        while launcher.poll() is None and self._attempts() == attempt:
            assert time.monotonic() < end, f"attempt {attempt} goes on as if nothing had struck"
            time.sleep(0.02)

    # --- faults: each says whether there was anything to strike ------------------------------------

    def _signal(self, ranks: Sequence[int], number: int) -> bool:
        beats = [beat for beat in self._beats() if beat.rank in ranks]
        for beat in beats:
            with suppress(ProcessLookupError):
                os.kill(beat.pid, number)
        return bool(beats)

    def _ask(self, kind: str) -> bool:
        self._asked.write_text(f"{kind}:{self._draw.randrange(RANKS)}")
        return True

    def _kill_rank(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._signal([self._draw.randrange(RANKS)], signal.SIGKILL)

    def _kill_ranks(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._signal(range(RANKS), signal.SIGKILL)

    def _kill_launcher(self, launcher: subprocess.Popen[bytes]) -> bool:
        launcher.kill()
        launcher.wait()
        return True

    def _kill_all(self, launcher: subprocess.Popen[bytes]) -> bool:
        """As when a node goes."""
        launcher.kill()
        self._signal(range(RANKS), signal.SIGKILL)
        launcher.wait()
        return True

    def _hang(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._signal([self._draw.randrange(RANKS)], signal.SIGSTOP)

    def _stop_launcher(self, launcher: subprocess.Popen[bytes]) -> bool:
        launcher.send_signal(self._draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]))
        return True

    def _stop_rank(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._signal([self._draw.randrange(RANKS)], signal.SIGTERM)

    def _stop_by_hand(self, launcher: subprocess.Popen[bytes]) -> bool:
        (self.run / "STOP").touch()
        return True

    def _raise(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._ask("raise")

    def _leave(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._ask("exit")

    def _nan(self, launcher: subprocess.Popen[bytes]) -> bool:
        return self._ask(self._draw.choice(["nan_loss", "nan_gradient", "nan_weight"]))

    def _damage(self, launcher: subprocess.Popen[bytes]) -> bool:
        """The power fails, and the newest of several checkpoints has lost a bit, or half a file."""
        self._kill_all(launcher)
        checkpoints = complete_checkpoints(self.run / "checkpoints")
        if len(checkpoints) > 1:
            path = self._draw.choice(sorted(path for path in checkpoints[-1].rglob("*") if path.is_file()))
            content = bytearray(path.read_bytes())
            if self._draw.random() < 0.5:
                content[self._draw.randrange(len(content))] ^= 1
            else:
                del content[len(content) // 2 :]
            path.write_bytes(content)
        return True

    # --- what is left ----------------------------------------------------------------------------

    def _told(self) -> Report:
        attempts = read_attempts(self.run)
        self._report.attempts = attempts
        self._report.num_steps = int(json.loads((self.run / "status.json").read_text())["num_steps"])
        worked = [attempt for attempt in attempts if attempt.last_step > attempt.first_step]
        self._report.lost = [one.last_step - other.first_step for one, other in pairwise(worked)]
        return self._report


def differences(run: Path, unbroken: Path) -> list[str]:
    """What is not to the last bit as in the run without faults; empty where all is."""
    ours, theirs = metrics(run), metrics(unbroken)
    found = []
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        found.append(f"{len(ours)} lines of figures in place of {len(theirs)}, or steps that are missing or doubled")
    for one, other in zip(ours, theirs, strict=False):
        found += [f"step {other['step']}: {key}" for key in MEASURED if one.get(key) != other.get(key)]
    for name in ("model/model.safetensors",):
        if (run / name).read_bytes() != (unbroken / name).read_bytes():
            found.append(name)
    return found
