"""A job of a partition that others preempt, ten times in one run."""

from __future__ import annotations

import time
from pathlib import Path

from cluster import Cluster
from interrupted import Interrupted, differences, lost_steps, planned

from packhorse.record.attempts import read_attempts

TIMES = 10


def preempt(run: Interrupted) -> None:
    """A job of higher priority takes both nodes for a moment; GraceTime lets ours save."""
    words = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--mem=1", "--output=/dev/null", "--wrap"]
    run.cluster.ask("sbatch", *words, "sleep 1")
    started = time.monotonic()
    while time.monotonic() - started < 20:
        if "Preempt" in run.cluster.ask("scontrol", "show", "job", run.job):
            break
        time.sleep(0.1)
    time.sleep(1.0)


def test_preempted_ten_times_it_ends_with_the_weights_of_an_unbroken_run(
    cluster: Cluster, slurm_folder: Path, unbroken: Path
) -> None:
    run = planned(slurm_folder, "preempted", "parallel.processes=2")
    job = Interrupted(cluster, run, "--nodes=2", "--partition=low")
    for number in range(TIMES):
        job.interrupt(("forward", "evaluate", "publish")[number % 3], preempt, is_signal=True)
    assert job.end() == "COMPLETED", cluster.told(job.job)
    assert differences(run, unbroken) == []
    assert len(read_attempts(run)) == TIMES + 1
    assert max(lost_steps(run)) <= 1
