"""Answers to the job script when an attempt begins and ends; heartbeats and records are made up."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from launching_cases import PREPARED, planned

from packhorse.errors import EXIT_LOST, EXIT_STOPPED, UserError
from packhorse.launching.slurm.in_job import EXIT_NO_PROGRESS, begin, end, main, record_successor
from packhorse.launching.slurm.next_action import SlurmSignals
from packhorse.plan.run_plan import RunPlan, write_plan
from packhorse.run_folder.attempts import read_attempts
from packhorse.run_folder.checkpoints.manifest import CheckpointManifest, RunFacts
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.run_folder.jobs import append_job, read_jobs
from packhorse.run_folder.layout import CANCEL_FILE, LOCK_FILE, STOP_FILE
from packhorse.run_folder.lock import launcher_lock, lock_holder
from packhorse.run_folder.status import Status, read_status, write_status

JOB = {"SLURM_JOB_ID": "12", "PACKHORSE_CHAIN": "12", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "4"}
GONE = 2**22 + 1
"""Number of no process: above the maximum of Linux."""


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    """A plan for two nodes with one process each, with prepared data."""
    made = planned(tmp_path)
    topology = made.topology.model_copy(update={"num_nodes": 2, "processes_per_node": 1})
    made = made.model_copy(update={"topology": topology, "data": PREPARED})
    write_plan(made, Path(made.run_folder))
    return made


@pytest.fixture
def run(plan: RunPlan) -> Path:
    return Path(plan.run_folder)


def beat(run: Path, attempt: int, rank: int, phase: str = "forward", step: int = 5, at: float | None = None) -> None:
    now = time.time() if at is None else at
    heartbeat = Heartbeat(rank, GONE, f"node{rank + 1}", phase, step, now, now, 0)
    (run / "logs" / f"attempt-{attempt}" / f"heartbeat-{rank}.json").write_text(json.dumps(asdict(heartbeat)))


def record(run: Path, attempt: int, rank: int, code: int, message: str = "", **more: Any) -> None:
    content = {"rank": rank, "time": time.time(), "exit_code": code, "message": message, "again": None, **more}
    (run / "logs" / f"attempt-{attempt}" / f"rank-{rank}.json").write_text(json.dumps(content))


def set_status(run: Path, state: str, attempt: int, step: int = 5) -> None:
    write_status(run, Status(state=state, step=step, num_steps=40, attempt=attempt))


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    facts = RunFacts(step=step, engine="ddp", world_size=2, plan="", data="", wandb_id=None)
    (folder / "manifest.json").write_text(CheckpointManifest(run=facts, files={}).sealed().model_dump_json())


def ended(run: Path, attempt: int, signals: SlurmSignals | None = None, code: int = 1) -> tuple[str, int, str]:
    decision = end(str(run), 3, code, signals or SlurmSignals(), JOB | {"PACKHORSE_ATTEMPT": str(attempt)})
    return decision.action, decision.exit_code, decision.reason


def test_an_attempt_begins_with_its_number_threads_and_launch_arguments(run: Path, plan: RunPlan) -> None:
    number, threads, *words = begin(str(run), 3, JOB)
    assert (number, threads) == ("1", str(min(4, plan.topology.threads_per_process)))
    assert words[words.index("--num_machines") + 1] == "2"
    assert words[-2:] == list(plan.argv[-2:])
    assert (run / "logs" / "attempt-1").is_dir()
    assert lock_holder(run)["job"] == "12"


def test_a_finished_run_does_not_begin_again(run: Path) -> None:
    set_status(run, "finished", 1, 40)
    assert begin(str(run), 3, JOB) == ["finished"]
    assert not (run / "logs").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"SLURM_NNODES": "3"}, "the job has 3 nodes"), ({"SLURM_NNODES": "1"}, "sbatch --nodes=2 ")],
    ids=["more nodes", "fewer nodes"],
)
def test_a_job_of_another_size_than_planned_is_refused(run: Path, changed: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        begin(str(run), 3, JOB | changed)
    assert words in str(caught.value)
    assert not (run / "logs").exists()


def test_a_job_with_fewer_gpus_than_planned_is_refused(run: Path, plan: RunPlan) -> None:
    topology = plan.topology.model_copy(update={"device": "cuda", "processes_per_node": 8})
    write_plan(plan.model_copy(update={"topology": topology}), run)
    with pytest.raises(UserError, match="2 nodes x 8 processes on cuda; the job has 2 nodes x 4 GPUs"):
        begin(str(run), 3, JOB | {"SLURM_GPUS_ON_NODE": "4"})
    assert begin(str(run), 3, JOB | {"SLURM_GPUS_ON_NODE": "8"})[0] == "1"


def test_a_run_without_prepared_data_does_not_begin(run: Path, plan: RunPlan) -> None:
    write_plan(plan.model_copy(update={"data": None}), run)
    with pytest.raises(UserError, match="is not prepared yet"):
        begin(str(run), 3, JOB)


def test_a_queued_job_does_not_begin_a_cancelled_run(run: Path) -> None:
    (run / CANCEL_FILE).touch()
    with pytest.raises(UserError, match="was cancelled") as caught:
        begin(str(run), 3, JOB)
    assert caught.value.exit_code == EXIT_STOPPED


def test_only_another_chain_is_refused_while_ranks_live(run: Path) -> None:
    begin(str(run), 3, JOB)
    beat(run, 1, 0)
    with pytest.raises(UserError, match="is run by job 12 of Slurm"):
        begin(str(run), 3, JOB | {"SLURM_JOB_ID": "13", "PACKHORSE_CHAIN": "13"})
    with pytest.raises(UserError, match="scancel 12"), launcher_lock(run):
        pass
    assert begin(str(run), 3, JOB)[0] == "2"
    assert begin(str(run), 3, JOB | {"SLURM_JOB_ID": "14"})[0] == "3"


def test_a_killed_job_loses_the_run_once_its_ranks_are_silent(run: Path) -> None:
    begin(str(run), 3, JOB)
    began = run / "logs" / "attempt-1" / "began.json"
    began.write_text(json.dumps({**json.loads(began.read_text()), "started_at": time.time() - 100}))
    beat(run, 1, 0, at=time.time() - 91)
    assert begin(str(run), 3, JOB | {"SLURM_JOB_ID": "13", "PACKHORSE_CHAIN": "13"})[0] == "2"
    with launcher_lock(run.parent):
        pass


def test_a_local_launch_on_another_host_keeps_jobs_out(run: Path) -> None:
    (run / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "another", "since": "2001"}))
    with pytest.raises(UserError, match="process 1 on another since 2001"):
        begin(str(run), 3, JOB)


def test_a_stop_request_of_the_script_is_removed_and_a_users_request_stays(run: Path) -> None:
    (run / STOP_FILE).write_text("job 11\n")
    begin(str(run), 3, JOB)
    assert not (run / STOP_FILE).exists()
    (run / STOP_FILE).touch()
    begin(str(run), 3, JOB)
    assert (run / STOP_FILE).exists()


def test_only_attempts_without_progress_are_limited(run: Path) -> None:
    for number in range(1, 8):
        assert begin(str(run), 3, JOB)[0] == str(number)
        checkpoint(run, number)
    for _ in range(2):
        begin(str(run), 3, JOB)
    assert begin(str(run), 3, JOB)[0] == "10"
    with pytest.raises(UserError, match="the last 3 attempts of .* made no progress") as caught:
        begin(str(run), 3, JOB)
    assert caught.value.exit_code == EXIT_NO_PROGRESS
    status = read_status(run)
    assert status is not None
    assert "made no progress" in status.message
    assert begin(str(run), 3, JOB | {"SLURM_JOB_ID": "40", "PACKHORSE_CHAIN": "40"})[0] == "11", (
        "a new submission counts from zero"
    )


def test_a_killed_rank_is_named_from_the_launchers_log_and_the_job_tries_again(run: Path) -> None:
    begin(str(run), 3, JOB)
    for rank in (0, 1):
        beat(run, 1, rank, step=17)
    logs = run / "logs" / "attempt-1"
    (logs / "stderr.log").write_text(f"1: failed (exitcode: -9) local_rank: 0 (pid: {GONE}) of binary: python\n")
    action, code, reason = ended(run, 1)
    assert (action, code) == ("again", EXIT_LOST)
    assert "was killed by SIGKILL in phase forward of step 18" in reason
    (attempt,) = read_attempts(run)
    assert (attempt.outcome, attempt.last_step) == ("lost", 17)
    assert lock_holder(run)["job"] == "12", "this job continues"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        # Output of Slurm 22.05; and from src/slurmd/slurmstepd of Slurm, with a limit by cgroup.
        (
            "0: slurmstepd-node1: error: StepId=7.5 exceeded memory limit (1053990912 > 1048576000), being killed\n",
            "1,005 MiB on a node, and its limit is 1,000 MiB",
        ),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks", "over its limit"),
    ],
    ids=["measured by Slurm", "by a cgroup"],
)
@pytest.mark.parametrize("phase", ["load", None], ids=["while it loads", "before it has started"])
def test_ranks_over_the_host_memory_limit_are_recognised(run: Path, said: str, words: str, phase: str | None) -> None:
    begin(str(run), 3, JOB)
    if phase is not None:
        beat(run, 1, 1, phase=phase, step=0)
    (run / "logs" / "attempt-1" / "stderr.log").write_text(said)
    _, _, reason = ended(run, 1)
    assert f"the job's host memory was {words}: raise memory_per_gpu" in reason
    now = read_status(run)
    assert now is not None
    assert words in now.message


def test_ranks_that_saved_after_a_signal_requeue_the_job(run: Path) -> None:
    begin(str(run), 3, JOB)
    checkpoint(run, 5)
    for rank in (0, 1):
        beat(run, 1, rank, "end")
        record(run, 1, rank, EXIT_STOPPED, signalled=rank == 1)
    set_status(run, "stopped", 1)
    assert ended(run, 1)[:2] == ("requeue", EXIT_STOPPED)
    assert lock_holder(run) is None
    assert read_attempts(run)[0].outcome == "stopped"


def test_a_users_stop_request_ends_the_job(run: Path) -> None:
    begin(str(run), 3, JOB)
    for rank in (0, 1):
        beat(run, 1, rank, "end")
        record(run, 1, rank, EXIT_STOPPED, signalled=False)
    set_status(run, "stopped", 1)
    action, code, reason = ended(run, 1)
    assert (action, code) == ("give-up", EXIT_STOPPED)
    assert "stopped by the user" in reason


def test_a_rank_that_srun_killed_after_the_save_is_no_failure(run: Path) -> None:
    begin(str(run), 3, JOB)
    checkpoint(run, 5)
    beat(run, 1, 0, "end")
    beat(run, 1, 1, "save")
    record(run, 1, 0, EXIT_STOPPED, signalled=True)
    set_status(run, "stopped", 1)
    assert ended(run, 1)[0] == "requeue"


def test_a_finished_run_is_finished_with_any_exit_code(run: Path) -> None:
    begin(str(run), 3, JOB)
    beat(run, 1, 0, "end", 40)
    beat(run, 1, 1, "save", 40)
    set_status(run, "finished", 1, 40)
    assert ended(run, 1, code=134)[:2] == ("finished", 0)
    assert lock_holder(run) is None


def test_a_time_limit_before_the_ranks_start_counts_as_no_progress(run: Path) -> None:
    for number in (1, 2):
        begin(str(run), 3, JOB)
        assert ended(run, number, SlurmSignals(time_nearly_over=True), 0)[0] == "requeue"
    begin(str(run), 3, JOB)
    assert ended(run, 3, SlurmSignals(time_nearly_over=True), 0)[:2] == ("give-up", EXIT_STOPPED)


def test_a_hang_names_the_rank_that_the_others_waited_for(run: Path) -> None:
    begin(str(run), 3, JOB)
    for rank in (0, 1):
        beat(run, 1, rank, "backward" if rank == 0 else "data", 17)
    record(run, 1, 0, EXIT_LOST, "rank 1 hung in phase data", hung=1)
    action, code, reason = ended(run, 1)
    assert (action, code) == ("again", EXIT_LOST)
    assert reason.startswith("rank 1 hung in phase data of step 18, where it had been since")


def test_answers_of_the_command_line_and_exit_codes_of_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin", str(run), "3"], JOB) == 0
    assert capsys.readouterr().out.startswith("1\n")
    checkpoint(run, 1)
    assert main(["end", str(run), "3", "0", "yes", "no"], JOB | {"PACKHORSE_ATTEMPT": "1"}) == 0
    assert capsys.readouterr().out == "requeue 75\n"
    assert main(["begin", str(run), "3"], JOB | {"SLURM_NNODES": "5"}) == 2
    assert capsys.readouterr().out == ""


def test_the_successor_of_a_job_is_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packhorse.launching.slurm.in_job.link_successor", lambda *_: [])
    record_successor(str(run), "13", JOB)
    (job,) = read_jobs(run)
    assert (job.job_id, job.kind, job.goes_on_from) == ("13", "train", "12")
    assert job.argv[-2].endswith("slurm/job.sbatch")
    sent = ("sbatch", "--parsable", str(run / "job.sbatch"), str(run))
    append_job(run, job.model_copy(update={"job_id": "14", "argv": sent}))
    record_successor(str(run), "15", JOB | {"SLURM_JOB_ID": "14"})
    assert read_jobs(run)[-1].argv == sent, "resume submits it with these arguments"
