"""A run that is interrupted again and again, each time at a moment that is chosen: a rank is held there until then."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from cluster import CHECKOUT, Cluster

from cli import INJECTED, metrics, packhorse
from packhorse.run_folder.attempts import read_attempts
from packhorse.run_folder.checkpoints.listing import complete_checkpoints, step_of
from packhorse.run_folder.heartbeat import read_heartbeats

# Learnt or decided, not timed: these must be the same to the last bit.
MEASURED = ("train/loss", "train/grad_norm", "train/learning_rate", "evaluation/loss")
HOLDS = {"forward": 1, "evaluate": 1, "publish": 0}
"""Phase to the rank that is held in it."""
SECONDS = 600.0
STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 2, 2
"""Enough that each of six interruptions comes after another checkpoint."""


def planned(folder: Path, name: str, *words: str, nodes: int = 2) -> Path:
    """A run folder for so many nodes, of the folder's `tiny.yaml`."""
    done = packhorse(folder, "plan", "tiny.yaml", f"name={name}", *words, "--nodes", str(nodes), "--write")
    assert done.code == 0, done.err
    return folder / "runs" / name


class Interrupted:
    """One job and the jobs that go on with it; `job` is its number."""

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        *options: str,
        script: Path | None = None,
        hold: tuple[str, int] | None = None,
    ) -> None:
        self.cluster, self.run = cluster, run
        self._struck: list[int] = []
        self._file = run.parent / f"{run.name}.hold"
        if hold is not None:
            self._hold(*hold)
        paths = os.pathsep.join(map(str, (INJECTED, CHECKOUT / "src", CHECKOUT / "tests")))
        variables = {"PACKHORSE_HOLD_FILE": str(self._file), "PYTHONPATH": paths}
        chosen = {} if script is None else {"script": script}
        self.job = cluster.submit(run, *options, **chosen, **variables)

    def interrupt(self, phase: str, strike: Callable[[Interrupted], None], is_signal: bool) -> None:
        """Waits until all ranks work and have gained a checkpoint, and one stands in that phase; strikes there.

        Args:
            phase: One of `HOLDS`.
            strike: What happens to the job.
            is_signal: The ranks live on, and are let go; the request must have reached them when `strike` returns.
        """
        self._hold(phase, self._newest_step() + SAVE_EVERY + 1)
        self.wait_for(self._held.exists, f"no rank came to {phase}")
        self._struck.append(self.attempts)
        strike(self)
        if is_signal:
            self.let_go()
        self.wait_for_attempt(self._struck[-1] + 1)
        self.let_go()
        self._held.unlink(missing_ok=True)

    def told(self) -> str:
        """What the job has written."""
        return self.cluster.told(self.job)

    def lost_steps(self) -> list[int]:
        """For each interruption, steps between where its attempt ended and where the next that worked began."""
        attempts = {attempt.attempt: attempt for attempt in read_attempts(self.run)}
        worked = [attempt for attempt in attempts.values() if attempt.last_step > attempt.first_step]
        after = [next(later for later in worked if later.attempt > number) for number in self._struck]
        return [attempts[number].last_step - later.first_step for number, later in zip(self._struck, after)]

    def let_go(self) -> None:
        """The rank that is held goes on, if it lives."""
        self._file.unlink(missing_ok=True)

    def wait_for_attempt(self, number: int) -> None:
        """Until the job has begun this attempt."""
        self.wait_for((self.run / "logs" / f"attempt-{number}").is_dir, f"attempt {number} did not come")

    def end(self, seconds: float = 900) -> str:
        """Lets the run end; the state of its job."""
        return self.cluster.wait(self.job, seconds)

    @property
    def attempts(self) -> int:
        return len(list((self.run / "logs").glob("attempt-*")))

    @property
    def _held(self) -> Path:
        return self._file.with_suffix(".held")

    def _hold(self, phase: str, least_step: int) -> None:
        draft = self._file.with_suffix(".draft")
        draft.write_text(f"{phase}:{HOLDS[phase]}:{least_step}")
        draft.replace(self._file)

    def _newest_step(self) -> int:
        complete = complete_checkpoints(self.run / "checkpoints")
        return step_of(complete[-1]) if complete else 0

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        self.cluster.wait_until(condition, SECONDS, lambda: f"{what}; {self.cluster.told(self.job)}")


# --- what happens to a job -------------------------------------------------------------------------------------------


def requeue(run: Interrupted) -> None:
    run.cluster.ask("scontrol", "requeue", run.job)
    time.sleep(0.5)


def time_is_nearly_over(run: Interrupted) -> None:
    """What `--signal` does, at a moment that we choose: time limits are whole minutes."""
    run.cluster.ask("scancel", "--batch", "--signal=USR1", run.job)
    run.cluster.wait_until((run.run / "STOP").exists, 20, lambda: run.cluster.told(run.job))


def signal_ranks(run: Interrupted) -> None:
    run.cluster.ask("scancel", "--signal=TERM", run.job)
    time.sleep(1.0)


def kill_step(run: Interrupted) -> None:
    steps = run.cluster.ask("squeue", "-h", "-s", "-j", run.job, "-o", "%i").split()
    numbers = [step for step in steps if step.partition(".")[2].isdecimal()]
    run.cluster.ask("scancel", "--signal=KILL", max(numbers, key=lambda step: int(step.partition(".")[2])))


def preempt(run: Interrupted) -> None:
    """A job of higher priority takes both nodes for a moment; GraceTime lets ours save."""
    words = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--mem=1", "--output=/dev/null", "--wrap"]
    run.cluster.ask("sbatch", *words, "sleep 1")
    run.wait_for(lambda: run.cluster.job(run.job).get("PreemptTime") not in (None, "None"), "it was not preempted")
    time.sleep(1.0)


def lose_node(name: str) -> Callable[[Interrupted], None]:
    def strike(run: Interrupted) -> None:
        run.cluster.kill_node(name)
        # Here a node that is back before Slurm misses it seems never to have been away: all share one boot time.
        run.wait_for(
            lambda: run.cluster.ask("sinfo", "-h", "-n", name, "-o", "%T").startswith("down"), "no node is down"
        )
        run.cluster.start_node(name)

    return strike


# --- what is left ----------------------------------------------------------------------------------------------------


def differences(run: Path, unbroken: Path) -> list[str]:
    """What is not to the last bit as in the run that nothing happened to; empty where all is."""
    ours, theirs = metrics(run), metrics(unbroken)
    found = []
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        found.append(f"lines of steps {[line['step'] for line in ours]}")
    for one, other in zip(ours, theirs, strict=False):
        found += [f"step {other['step']}: {key}" for key in MEASURED if one.get(key) != other.get(key)]
    weights = "model/model.safetensors"
    return found + [weights] * ((run / weights).read_bytes() != (unbroken / weights).read_bytes())


def state(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text(encoding="utf-8"))["state"])


def hosts(run: Path, attempt: int = 1) -> list[str]:
    """Where each rank of an attempt ran."""
    return [beat.host for beat in read_heartbeats(run / "logs" / f"attempt-{attempt}")]
