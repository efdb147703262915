"""Runs through `sbatch slurm/job.sbatch RUN` on the nodes of a real Slurm, and what may happen to a job."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster
from interrupted import (
    SAVE_EVERY,
    Interrupted,
    differences,
    hosts,
    kill_step,
    lose_node,
    planned,
    preempt,
    requeue,
    signal_ranks,
    state,
    time_is_nearly_over,
)

from cli import curve, metrics, packhorse
from packhorse.launching.local.environment import FOLDER_VARIABLE, extensions_folder
from packhorse.launching.slurm.script import job_script, train_request
from packhorse.launching.slurm.site import SiteProfile
from packhorse.run_folder.attempts import read_attempts
from packhorse.run_folder.jobs import read_jobs
from packhorse.run_folder.lock import lock_holder

SHORT = ("steps=6", "batch.packs=8", "checkpoint.every_steps=null", "evaluation.every_steps=null")
PHASES = ("forward", "evaluate", "publish")
SIGNALS = {"the end of its time": time_is_nearly_over, "a signal": signal_ranks}
ENDS = {
    "requeue": requeue,
    "a killed step": kill_step,
    "a lost first node": lose_node("node1"),
    "a lost other node": lose_node("node2"),
}
# Each kind once, over phases that rotate.
EVENTS = list(zip((*PHASES, *PHASES), (*SIGNALS, *ENDS), strict=True))
PREEMPTIONS = 2
# `make chaos`: each kind in each phase, but nodes, which take a minute each.
ALL_EVENTS = [
    *[(phase, name) for phase in PHASES for name in (*SIGNALS, "requeue", "a killed step")],
    ("forward", "a lost first node"),
    ("evaluate", "a lost other node"),
    ("publish", "a lost first node"),
]
ALL_PREEMPTIONS = 10
MORE_STEPS = "steps=80"


def interrupt_in_phases(cluster: Cluster, run: Path, events: list[tuple[str, str]]) -> Interrupted:
    job = Interrupted(cluster, run, "--nodes=2")
    for phase, name in events:
        job.interrupt(phase, (SIGNALS | ENDS)[name], is_signal=name in SIGNALS or name == "requeue")
    return job


def preempt_again_and_again(cluster: Cluster, run: Path, times: int) -> Interrupted:
    job = Interrupted(cluster, run, "--nodes=2", "--partition=low")
    for number in range(times):
        job.interrupt(PHASES[number % 3], preempt, is_signal=True)
    return job


@pytest.fixture(scope="module")
def chains(slurm_folder: Path) -> Iterator[tuple[Future[Interrupted], Future[Interrupted]]]:
    """Two runs that are interrupted again and again, each on a cluster of its own: most of it is waiting for Slurm."""
    runs = [planned(slurm_folder, name, "parallel.processes=2") for name in ("interrupted", "preempted")]
    with running_cluster() as one, running_cluster() as other, ThreadPoolExecutor(2) as pool:
        yield (
            pool.submit(interrupt_in_phases, one, runs[0], EVENTS),
            pool.submit(preempt_again_and_again, other, runs[1], PREEMPTIONS),
        )


@pytest.fixture(scope="module")
def interrupted(chains: tuple[Future[Interrupted], Future[Interrupted]]) -> Future[Interrupted]:
    return chains[0]


@pytest.fixture(scope="module")
def preempted(chains: tuple[Future[Interrupted], Future[Interrupted]]) -> Future[Interrupted]:
    return chains[1]


def reach_the_limit_twice(cluster: Cluster, run: Path) -> Interrupted:
    """Three minutes each time, of which the last half is for saving; the first time the ranks do not listen."""
    job = Interrupted(cluster, run, "--time=3", "--signal=B:USR1@90", hold=("forward", 3))
    job.wait_for_attempt(2)
    job.wait_for((run / "STOP").exists, "the time of the second job is not over")
    job.let_go()
    job.wait_for_attempt(3)
    cluster.ask("scancel", job.job)
    return job


@pytest.fixture(scope="module")
def limited(slurm_folder: Path) -> Iterator[Future[Interrupted]]:
    """A job on a node of its own, submitted before all others: it stands still while they run."""
    words = ("parallel.processes=2", "steps=1000000", "evaluation.every_steps=null")
    run = planned(slurm_folder, "limited", *words, nodes=1)
    with running_cluster(SLURM_TEST_NODES="1") as own, ThreadPoolExecutor(1) as pool:
        yield pool.submit(reach_the_limit_twice, own, run)


def test_two_nodes_of_two_ranks_follow_the_curve_of_one_process(
    limited: Future[Interrupted], cluster: Cluster, slurm_folder: Path
) -> None:
    runs = {
        engine: planned(slurm_folder, engine, f"parallel.engine={engine}", "parallel.processes=4", *SHORT)
        for engine in ("ddp", "zero2")
    }
    # Built once for this environment, and not by each job anew.
    built = {FOLDER_VARIABLE: str(extensions_folder())}
    jobs = {engine: cluster.submit(run, "--nodes=2", **built) for engine, run in runs.items()}
    assert packhorse(slurm_folder, "train", "tiny.yaml", "name=alone", *SHORT).code == 0
    expected = curve(slurm_folder / "runs" / "alone")
    assert len(expected) == 6
    for engine, run in runs.items():
        assert cluster.wait(jobs[engine]) == "COMPLETED", cluster.told(jobs[engine])
        assert curve(run) == pytest.approx(expected, abs=1e-5, rel=0), engine
        assert hosts(run) == ["node1", "node1", "node2", "node2"]
        (attempt,) = read_attempts(run)
        assert (attempt.outcome, attempt.last_step) == ("finished", 6)
        assert lock_holder(run) is None
    again = cluster.submit(runs["ddp"], "--nodes=2")
    assert cluster.wait(again) == "COMPLETED"
    assert len(read_attempts(runs["ddp"])) == 1, "a finished run is not trained again"


def assert_interrupted_as_unbroken(job: Interrupted, events: list[tuple[str, str]], unbroken: Path) -> None:
    assert job.end() == "COMPLETED", job.told()
    assert differences(job.run, unbroken) == []
    lost = list(zip(events, job.lost_steps(), strict=True))
    # Slurm gives ranks KillWait seconds (here 5) after a requeue: enough to save, or as after a kill.
    assert [(event, steps) for event, steps in lost if steps > (1 if event[1] in SIGNALS else SAVE_EVERY)] == []


def assert_preempted_as_unbroken(job: Interrupted, times: int, unbroken: Path) -> None:
    assert job.end() == "COMPLETED", job.told()
    assert differences(job.run, unbroken) == []
    lost = job.lost_steps()
    assert len(lost) == times
    assert max(lost) <= 1


def test_whatever_happens_in_training_evaluation_and_saving_it_comes_back_by_itself(
    interrupted: Future[Interrupted], unbroken: Path
) -> None:
    assert_interrupted_as_unbroken(interrupted.result(), EVENTS, unbroken)


def test_preempted_twice_it_ends_with_the_weights_of_an_unbroken_run(
    preempted: Future[Interrupted], unbroken: Path
) -> None:
    assert_preempted_as_unbroken(preempted.result(), PREEMPTIONS, unbroken)


@pytest.mark.chaos
def test_each_kind_of_interruption_in_each_phase_and_ten_preemptions(cluster: Cluster, slurm_folder: Path) -> None:
    words = ("parallel.processes=2", MORE_STEPS)
    names = ("unbroken-longer", "interrupted-often", "preempted-often")
    unbroken, *runs = (planned(slurm_folder, name, *words) for name in names)
    job = cluster.submit(unbroken, "--nodes=2")
    with running_cluster() as one, running_cluster() as other, ThreadPoolExecutor(2) as pool:
        interrupted = pool.submit(interrupt_in_phases, one, runs[0], ALL_EVENTS)
        preempted = pool.submit(preempt_again_and_again, other, runs[1], ALL_PREEMPTIONS)
        assert cluster.wait(job, 900) == "COMPLETED", cluster.told(job)
        assert_interrupted_as_unbroken(interrupted.result(), ALL_EVENTS, unbroken)
        assert_preempted_as_unbroken(preempted.result(), ALL_PREEMPTIONS, unbroken)


def test_where_requeue_is_forbidden_another_job_goes_on(cluster: Cluster, slurm_folder: Path, unbroken: Path) -> None:
    run = planned(slurm_folder, "followed", "parallel.processes=2")
    site = SiteProfile(name="here", gpus_per_node=0, cpus_per_node=1, memory_per_node="16000M", requeue=False)
    request = train_request(site, "followed", run, num_nodes=2, gpus_per_node=0, time="00:10:00", signal_seconds=60)
    script = slurm_folder / "job.sbatch"
    script.write_text(job_script(site, request, programs=None), encoding="utf-8")
    job = Interrupted(cluster, run, script=script)
    job.interrupt("forward", time_is_nearly_over, is_signal=True)
    assert cluster.wait(job.job) == "FAILED"
    first, *_ = read_jobs(run)
    assert first.goes_on_from == job.job
    assert cluster.wait(first.job_id) == "COMPLETED", cluster.told(first.job_id)
    *_, never = read_jobs(run)
    assert never.goes_on_from == first.job_id
    assert cluster.wait(never.job_id) == "CANCELLED", "nothing is left to do for it"
    assert state(run) == "finished"
    assert differences(run, unbroken) == []
    assert len(read_attempts(run)) == 2


def test_at_its_time_limit_a_job_goes_on_even_if_it_could_not_save(limited: Future[Interrupted]) -> None:
    run = limited.result().run
    first, second, *_ = read_attempts(run)
    assert first.outcome in ("killed", "lost")
    assert (first.first_step, first.last_step, second.first_step) == (0, 3, 2)
    assert (second.outcome, second.message) == ("stopped", "stopped")
    assert second.last_step >= 3
    steps = [line["step"] for line in metrics(run)]
    assert steps[: second.last_step + 1] == list(range(second.last_step + 1))
