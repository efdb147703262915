"""Reports of the jobs of a run: their condition, why one waits, and why the rest of a chain does not run."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from launching_cases import PREPARED, planned

from packhorse.cli.show.jobs import queue_words
from packhorse.cli.status import status
from packhorse.launching.slurm import jobs as slurm_jobs
from packhorse.launching.slurm.client import JobState, NoSlurmError, SlurmClient
from packhorse.launching.slurm.job_reports import JobReport, read_ends, report_jobs
from packhorse.launching.slurm.jobs import link_successor, resubmit, unfinished_jobs
from packhorse.plan.run_plan import write_plan
from packhorse.recipe.shipped import shipped_path
from packhorse.run_folder.attempts import AttemptStart, write_attempt_start
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.run_folder.jobs import JobKind, JobRecord, append_job, read_jobs
from packhorse.run_folder.layout import LOCK_FILE
from packhorse.run_folder.status import State, Status, write_status
from packhorse.workflows import run_state

CHAIN: tuple[JobKind, ...] = ("prepare", "train", "evaluate", "verify")


def chained(first: int = 11, goes_on_from: str | None = None) -> list[JobRecord]:
    """Jobs 11 to 14, each waiting for the one before."""
    return [
        JobRecord(
            job_id=str(first + at),
            kind=kind,
            submitted_at=0.0,
            argv=("sbatch", "--parsable", f"--dependency=afterok:{first + at - 1}", f"{kind}.sbatch", "RUN"),
            depends_on=(str(first + at - 1),) if at else (),
            goes_on_from=goes_on_from,
        )
        for at, kind in enumerate(CHAIN)
    ]


def conditions(reports: list[JobReport]) -> list[tuple[str, str, str]]:
    return [(report.record.kind, report.condition, report.reason) for report in reports]


def run_command_script(folder: Path, run: Path, command: str, job_id: str, exit_code: int) -> None:
    """Run slurm/command.sbatch as Slurm would, with a `packhorse` that only exits."""
    program = folder / "bin" / "packhorse"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": job_id}
    script = str(shipped_path("slurm", "command.sbatch"))
    assert subprocess.run(["bash", script, command, str(run)], env=environment).returncode == exit_code


def now(state: State, message: str = "") -> Status:
    return Status(state=state, step=3, num_steps=40, attempt=1, message=message)


def test_the_rest_of_a_chain_waits_for_the_job_before() -> None:
    states = [
        JobState("11", "COMPLETED"),
        JobState("12", "RUNNING", nodes="node1"),
        *(JobState(number, "PENDING", "Dependency") for number in ("13", "14")),
    ]
    assert conditions(report_jobs(list(zip(chained(), states, strict=True)), {}, now("training"), has_data=True)) == [
        ("prepare", "done", ""),
        ("train", "runs", ""),
        ("evaluate", "waits", "it starts after job 12 (train) succeeds"),
        ("verify", "waits", "it starts after job 13 (evaluate) succeeds"),
    ]


@pytest.mark.parametrize("forgotten", [False, True], ids=["known to Slurm", "forgotten by Slurm"])
def test_after_a_failed_job_the_rest_does_not_run(forgotten: bool) -> None:
    states: list[JobState | None] = [
        JobState("11", "COMPLETED"),
        JobState("12", "FAILED", "NonZeroExitCode", exit_code="1:0"),
        *(JobState(number, "CANCELLED", "DependencyNeverSatisfied") for number in ("13", "14")),
    ]
    jobs = list(zip(chained(), [None] * 4 if forgotten else states, strict=True))
    status = now("failed", "rank 1 failed: RuntimeError: no\nsecond line")
    assert conditions(report_jobs(jobs, {}, status, has_data=True)) == [
        ("prepare", "done", ""),
        ("train", "failed", "rank 1 failed: RuntimeError: no"),
        ("evaluate", "not run", "job 12 (train) did not succeed"),
        ("verify", "not run", "job 13 (evaluate) did not run"),
    ]


def test_the_recorded_end_of_a_job_outlives_slurms_memory(tmp_path: Path) -> None:
    run_command_script(tmp_path, tmp_path, "evaluate", "13", 2)
    reports = report_jobs([(record, None) for record in chained()], read_ends(tmp_path), now("finished"), has_data=True)
    assert conditions(reports)[1:] == [
        ("train", "done", ""),
        ("evaluate", "failed", "exit code 2"),
        ("verify", "not run", "job 13 (evaluate) did not succeed"),
    ]
    assert [record.job_id for record in unfinished_jobs(reports)] == ["13", "14"]


def test_a_resubmitted_job_replaces_the_failed_one() -> None:
    jobs = [(record, None) for record in chained()]
    again = [
        JobRecord(job_id="20", kind="evaluate", submitted_at=1.0, argv=("sbatch",)),
        JobRecord(job_id="21", kind="verify", submitted_at=1.0, argv=("sbatch",), depends_on=("20",)),
    ]
    live = [(again[0], JobState("20", "RUNNING")), (again[1], JobState("21", "PENDING", "Dependency"))]
    reports = report_jobs([*jobs, *live], {}, now("finished"), has_data=True)
    assert [report.condition for report in reports] == ["done", "done", "replaced", "replaced", "runs", "waits"]
    assert reports[2].reason == "replaced by job 20"


def test_jobs_after_training_wait_for_its_successor() -> None:
    successor = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch",), goes_on_from="12")
    states = [None, JobState("12", "TIMEOUT"), *(JobState(each, "PENDING", "Dependency") for each in ("13", "14"))]
    jobs = [*zip(chained(), states, strict=True), (successor, JobState("30", "PENDING", "Priority"))]
    reports = report_jobs(jobs, {}, now("stopped"), has_data=True)
    assert conditions(reports)[2] == ("evaluate", "waits", "it starts after job 30 (train) succeeds")
    assert conditions(reports)[4] == ("train", "waits", "jobs with a higher priority start first (Priority)")


def test_no_job_waits_for_a_successor_while_the_first_job_trains() -> None:
    """At a site without requeue, the successor of a training job is queued when that job starts."""
    successor = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch",), goes_on_from="12")
    waiting = [JobState(each, "PENDING", "Dependency") for each in ("13", "14", "30")]
    jobs = list(zip([*chained()[1:], successor], [JobState("12", "RUNNING"), *waiting], strict=True))
    reports = report_jobs(jobs, {}, now("training"), has_data=True)
    assert conditions(reports)[1] == ("evaluate", "waits", "it starts after job 12 (train) succeeds")
    assert conditions(reports)[3] == ("train", "waits", "it starts only if job 12 does not finish")
    assert queue_words(reports) == ""


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_an_unused_successor_is_neither_the_result_nor_resubmitted(state: State) -> None:
    unused = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch", "RUN"), goes_on_from="12")
    ended = JobState("12", "COMPLETED" if state == "finished" else "FAILED")
    jobs = [(chained()[1], ended), (unused, JobState("30", "CANCELLED", "DependencyNeverSatisfied"))]
    reports = report_jobs([*jobs, (chained()[2], None)], {}, now(state), has_data=True)
    assert [report.condition for report in reports[:2]] == ["done" if state == "finished" else "failed", "replaced"]
    assert [record.job_id for record in unfinished_jobs(reports)] == (["13"] if state == "finished" else ["12", "13"])
    if state == "failed":
        assert reports[2].reason == "job 12 (train) did not succeed"


def test_a_failed_successor_is_resubmitted_as_the_original_job() -> None:
    """A job submits its successor from a copy of the script that Slurm deletes when the job ends."""
    successor = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch", "RUN"), goes_on_from="12")
    jobs = [(chained()[1], JobState("12", "TIMEOUT")), (successor, JobState("30", "FAILED"))]
    reports = report_jobs(jobs, {}, now("failed", "x"), has_data=True)
    assert [report.condition for report in reports] == ["replaced", "failed"]
    assert unfinished_jobs(reports) == [chained()[1]]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "the requested nodes are busy (Resources)"),
        (
            "ReqNodeNotAvail, UnavailableNodes:node2",
            "a node that it needs is down, drained or reserved (ReqNodeNotAvail",
        ),
        ("QOSMaxGRESPerUser", "a limit of the account, user or QOS is reached (QOSMaxGRESPerUser)"),
        ("AssocGrpGRES", "a limit of the account, user or QOS is reached (AssocGrpGRES)"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_a_reason_is_shown_in_words_and_as_slurms_code(reason: str, words: str) -> None:
    jobs = [(chained()[1], JobState("12", "PENDING", reason))]
    assert report_jobs(jobs, {}, now("prepared"), has_data=True)[0].reason.startswith(words)


def test_slurm_explains_a_job_whose_run_recorded_no_end() -> None:
    jobs = [(chained()[1], JobState("12", "OUT_OF_MEMORY", "OutOfMemory", exit_code="0:125"))]
    reason = report_jobs(jobs, {}, now("training"), has_data=True)[0].reason
    assert reason == "OUT_OF_MEMORY, exit code 0:125: it used more memory than it had requested (OutOfMemory)"


def test_exit_codes_of_the_job_script_are_shown_in_words() -> None:
    jobs = [(chained()[1], JobState("12", "FAILED", "NonZeroExitCode", exit_code="20:0"))]
    reason = report_jobs(jobs, {}, now("prepared"), has_data=True)[0].reason
    assert reason == "FAILED, exit code 20:0: the doctor found a broken node, shown in its log"


def test_the_reason_why_a_cancelled_job_waited_is_not_its_end() -> None:
    jobs = [(chained()[1], JobState("12", "CANCELLED", "Resources", exit_code="0:0"))]
    assert report_jobs(jobs, {}, now("prepared"), has_data=True)[0].reason == "CANCELLED"


# --- status ---


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert status(str(run)) == 0
    return re.sub(r" +", " ", capsys.readouterr().out)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose four jobs were submitted, and the first of which failed before any rank had begun."""
    monkeypatch.setenv("COLUMNS", "200")
    plan = planned(tmp_path)
    folder = Path(plan.run_folder)
    write_plan(plan.model_copy(update={"data": PREPARED}), folder)
    write_status(folder, now("prepared"))
    for record in chained():
        append_job(folder, record)
    return folder


def slurm_says(monkeypatch: pytest.MonkeyPatch, *states: JobState | None) -> None:
    monkeypatch.setattr(run_state, "with_states", lambda records: list(zip(records, states, strict=True)))


def test_status_shows_the_chain_the_reason_and_the_first_failing_ranks_last_lines(
    run: Path, monkeypatch, capsys
) -> None:
    logs = run / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    write_attempt_start(logs, AttemptStart(started_at=1.0))
    for rank, (when, message) in {
        1: (5.0, "Traceback\n  File x\nValueError: bad row 7"),
        0: (9.0, "Traceback\nx"),
    }.items():
        record = {"rank": rank, "time": when, "exit_code": 1, "message": message, "first_step": 0, "again": None}
        (logs / f"rank-{rank}.json").write_text(json.dumps(record))
    write_status(run, now("failed", "rank 1 failed: ValueError: bad row 7"))
    slurm_says(monkeypatch, None, JobState("12", "FAILED", "NonZeroExitCode"), None, None)
    text = shown(run, capsys)
    assert "state failed: rank 1 failed: ValueError: bad row 7" in text
    assert "job 12 train: did not end well: rank 1 failed: ValueError: bad row 7" in text
    assert "job 13 evaluate: does not run: job 12 (train) did not succeed" in text
    assert f"next fix what failed; `packhorse resume {run}` resumes from there" in text
    assert f"failed first rank 1; its last lines (all of it in {logs}/rank-1.json):" in text
    assert "attempts 1: steps 0 to 0 in 0 s, failed: ValueError: bad row 7" in text
    assert "File x \n ValueError: bad row 7 \n" in text


def test_of_a_job_that_died_before_any_rank_its_own_last_lines_are_shown(run: Path, monkeypatch, capsys) -> None:
    (run / "logs").mkdir()
    (run / "logs" / "job-12.out").write_text("loading modules\npython: command not found\n")
    slurm_says(monkeypatch, None, JobState("12", "FAILED", "NonZeroExitCode", exit_code="127:0"), None, None)
    text = shown(run, capsys)
    assert f"failed first the job; its last lines (all of it in {run}/logs/job-12.out):" in text
    assert "python: command not found" in text
    assert "job 12 train: did not end well: FAILED, exit code 127:0: its script failed (NonZeroExitCode)" in text


def test_of_a_rank_that_a_signal_ended_the_log_and_the_signal_are_shown(run: Path, monkeypatch, capsys) -> None:
    logs = run / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    (logs / "heartbeat-1.json").write_text(json.dumps(asdict(Heartbeat(1, 77, "node2", "forward", 3, 1.0, 2.0))))
    (logs / "rank-1.log").write_text("step 3\n")
    (logs / "stderr.log").write_text("E1121 api.py: failed (exitcode: -9) local_rank: 1 (pid: 77) of binary: python\n")
    write_status(run, now("training"))
    slurm_says(monkeypatch, None, JobState("12", "FAILED"), None, None)
    text = shown(run, capsys)
    assert "failed first rank 1; its last lines" in text
    assert "it was killed by SIGKILL" in text


def test_a_run_whose_job_waits_again_is_not_shown_as_killed(run: Path, monkeypatch, capsys) -> None:
    write_status(run, now("training"))
    slurm_says(monkeypatch, None, JobState("12", "PENDING", "BeginTime", restarts=1), None, None)
    text = shown(run, capsys)
    assert "state training; job 12 waits in the queue: its earliest start time is not reached" in text
    assert "killed" not in text


def test_without_slurm_status_shows_what_the_run_folder_records(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def nothing(_: object) -> None:
        raise NoSlurmError("scontrol")

    monkeypatch.setattr(run_state, "with_states", nothing)
    run_command_script(tmp_path, run, "evaluate", "13", 1)
    text = shown(run, capsys)
    assert "job 12 train: unknown: Slurm is not available on this machine" in text
    assert "job 13 evaluate: did not end well: exit code 1" in text
    assert "the state of its jobs is not known" in text


def test_a_lock_that_a_job_left_does_not_make_its_run_live(run: Path, monkeypatch) -> None:
    (run / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "node9", "since": "x", "job": "12", "chain": "12"}))
    slurm_says(monkeypatch, None, JobState("12", "FAILED"), None, None)
    assert not run_state.is_under_way(run)
    slurm_says(monkeypatch, None, JobState("12", "RUNNING"), None, None)
    assert run_state.is_under_way(run)


# --- resubmitted ---


def test_unfinished_jobs_are_resubmitted_each_after_the_previous(run: Path, monkeypatch) -> None:
    typed: list[list[str]] = []
    sent = lambda _, words: str(typed.append(list(words)) or 50 + len(typed))  # noqa: E731
    monkeypatch.setattr(SlurmClient, "submit", sent)
    again = resubmit(run, chained()[1:])
    assert typed == [
        ["train.sbatch", "RUN"],
        ["--dependency=afterok:51", "--kill-on-invalid-dep=yes", "evaluate.sbatch", "RUN"],
        ["--dependency=afterok:52", "--kill-on-invalid-dep=yes", "verify.sbatch", "RUN"],
    ]
    assert read_jobs(run)[4:] == again
    assert again[2].depends_on == ("52",)


def test_jobs_that_wait_follow_training_through_every_job_of_a_chain(run: Path, monkeypatch) -> None:
    for job_id, before in (("30", "12"), ("31", "30")):
        append_job(run, JobRecord(job_id=job_id, kind="train", submitted_at=1.0, argv=(), goes_on_from=before))
    records = read_jobs(run)
    waiting = [(record, JobState(record.job_id, "PENDING", "Dependency")) for record in records[2:4]]
    changed: dict[str, list[str]] = {}
    monkeypatch.setattr(slurm_jobs, "live_jobs", lambda _: [*waiting, (records[4], JobState("30", "RUNNING"))])
    monkeypatch.setattr(SlurmClient, "depend_on_any", lambda _, job, any_of: changed.update({job: any_of}))
    assert link_successor(run, "30", "31") == ["13"]
    assert changed == {"13": ["30", "31"]}
