"""What a user reads of the jobs of a run: each in words, why one waits, and why the rest of a chain do not run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from launching_cases import PREPARED, planned

from packhorse.cli.show.jobs import queue_words
from packhorse.cli.status import status
from packhorse.launching.slurm import chain
from packhorse.launching.slurm.chain import follow, left_of, submit_again
from packhorse.launching.slurm.client import JobState, NoSlurmError
from packhorse.launching.slurm.jobs import JobRecord, Kind, append_job, read_jobs
from packhorse.launching.slurm.stages import Stage, read_ends, record_end, stages_of
from packhorse.plan.run_plan import write_plan
from packhorse.run_folder.attempts import Begun, begin_attempt
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.run_folder.lock import LOCK_FILE
from packhorse.run_folder.status import State, Status, write_status
from packhorse.workflows import run_state

CHAIN: tuple[Kind, ...] = ("prepare", "train", "evaluate", "verify")


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


def told(stages: list[Stage]) -> list[tuple[str, str, str]]:
    return [(stage.record.kind, stage.became, stage.why) for stage in stages]


def now(state: State, message: str = "") -> Status:
    return Status(state=state, step=3, num_steps=40, attempt=1, message=message)


def test_the_rest_of_a_chain_waits_for_the_job_before() -> None:
    states = [
        JobState("11", "COMPLETED"),
        JobState("12", "RUNNING", nodes="node1"),
        *(JobState(number, "PENDING", "Dependency") for number in ("13", "14")),
    ]
    assert told(stages_of(list(zip(chained(), states, strict=True)), {}, now("training"), has_data=True)) == [
        ("prepare", "done", ""),
        ("train", "runs", ""),
        ("evaluate", "waits", "it begins when job 12 (train) has ended well"),
        ("verify", "waits", "it begins when job 13 (evaluate) has ended well"),
    ]


@pytest.mark.parametrize("forgotten", [False, True], ids=["as Slurm tells", "Slurm has forgotten them"])
def test_after_a_failed_job_the_rest_do_not_run_and_say_why(forgotten: bool) -> None:
    states: list[JobState | None] = [
        JobState("11", "COMPLETED"),
        JobState("12", "FAILED", "NonZeroExitCode", exit_code="1:0"),
        *(JobState(number, "CANCELLED", "DependencyNeverSatisfied") for number in ("13", "14")),
    ]
    jobs = list(zip(chained(), [None] * 4 if forgotten else states, strict=True))
    status = now("failed", "rank 1 failed: RuntimeError: no\nsecond line")
    assert told(stages_of(jobs, {}, status, has_data=True)) == [
        ("prepare", "done", ""),
        ("train", "failed", "rank 1 failed: RuntimeError: no"),
        ("evaluate", "not run", "job 12 (train) did not end well"),
        ("verify", "not run", "job 13 (evaluate) did not run"),
    ]


def test_what_a_job_said_of_its_end_outlives_what_slurm_remembers(tmp_path: Path) -> None:
    record_end(tmp_path, "evaluate", "13", 2)
    stages = stages_of([(record, None) for record in chained()], read_ends(tmp_path), now("finished"), has_data=True)
    assert told(stages)[1:] == [
        ("train", "done", ""),
        ("evaluate", "failed", "exit code 2"),
        ("verify", "not run", "job 13 (evaluate) did not end well"),
    ]
    assert [record.job_id for record in left_of(stages)] == ["13", "14"]


def test_a_job_that_was_submitted_again_takes_the_place_of_the_failed_one() -> None:
    jobs = [(record, None) for record in chained()]
    again = [
        JobRecord(job_id="20", kind="evaluate", submitted_at=1.0, argv=("sbatch",)),
        JobRecord(job_id="21", kind="verify", submitted_at=1.0, argv=("sbatch",), depends_on=("20",)),
    ]
    live = [(again[0], JobState("20", "RUNNING")), (again[1], JobState("21", "PENDING", "Dependency"))]
    stages = stages_of([*jobs, *live], {}, now("finished"), has_data=True)
    assert [stage.became for stage in stages] == ["done", "done", "replaced", "replaced", "runs", "waits"]
    assert stages[2].why == "job 20 took its place"


def test_jobs_after_training_wait_for_the_job_that_goes_on_with_it() -> None:
    follower = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch",), goes_on_from="12")
    states = [None, JobState("12", "TIMEOUT"), *(JobState(each, "PENDING", "Dependency") for each in ("13", "14"))]
    jobs = [*zip(chained(), states, strict=True), (follower, JobState("30", "PENDING", "Priority"))]
    stages = stages_of(jobs, {}, now("stopped"), has_data=True)
    assert told(stages)[2] == ("evaluate", "waits", "it begins when job 30 (train) has ended well")
    assert told(stages)[4] == ("train", "waits", "other jobs come first (Priority)")


def test_a_job_that_stands_by_is_not_what_others_wait_for_while_the_first_one_trains() -> None:
    """Where the site forbids requeue, each training job has a follower in the queue from its start."""
    stands_by = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch",), goes_on_from="12")
    waiting = [JobState(each, "PENDING", "Dependency") for each in ("13", "14", "30")]
    jobs = list(zip([*chained()[1:], stands_by], [JobState("12", "RUNNING"), *waiting], strict=True))
    stages = stages_of(jobs, {}, now("training"), has_data=True)
    assert told(stages)[1] == ("evaluate", "waits", "it begins when job 12 (train) has ended well")
    assert told(stages)[3] == ("train", "waits", "it begins only if job 12 is cut short")
    assert queue_words(stages) == ""


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_job_that_stood_by_for_nothing_is_neither_the_result_nor_what_is_submitted_again(state: State) -> None:
    stood_by = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch", "RUN"), goes_on_from="12")
    ended = JobState("12", "COMPLETED" if state == "finished" else "FAILED")
    jobs = [(chained()[1], ended), (stood_by, JobState("30", "CANCELLED", "DependencyNeverSatisfied"))]
    stages = stages_of([*jobs, (chained()[2], None)], {}, now(state), has_data=True)
    assert [stage.became for stage in stages[:2]] == ["done" if state == "finished" else "failed", "replaced"]
    assert [record.job_id for record in left_of(stages)] == (["13"] if state == "finished" else ["12", "13"])
    if state == "failed":
        assert stages[2].why == "job 12 (train) did not end well"


def test_what_went_on_with_a_job_is_submitted_again_as_that_job_was() -> None:
    """A follower is submitted by the job itself, from a copy of the script that is gone when it ends."""
    follower = JobRecord(job_id="30", kind="train", submitted_at=1.0, argv=("sbatch", "RUN"), goes_on_from="12")
    jobs = [(chained()[1], JobState("12", "TIMEOUT")), (follower, JobState("30", "FAILED"))]
    stages = stages_of(jobs, {}, now("failed", "x"), has_data=True)
    assert [stage.became for stage in stages] == ["replaced", "failed"]
    assert left_of(stages) == [chained()[1]]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "the nodes that it asks for are busy (Resources)"),
        (
            "ReqNodeNotAvail, UnavailableNodes:node2",
            "a node that it needs is down, drained or reserved (ReqNodeNotAvail",
        ),
        ("QOSMaxGRESPerUser", "a limit of the account, user or QOS is reached (QOSMaxGRESPerUser)"),
        ("AssocGrpGRES", "a limit of the account, user or QOS is reached (AssocGrpGRES)"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_a_reason_is_told_in_words_and_as_slurm_has_it(reason: str, words: str) -> None:
    jobs = [(chained()[1], JobState("12", "PENDING", reason))]
    assert stages_of(jobs, {}, now("prepared"), has_data=True)[0].why.startswith(words)


def test_a_job_that_ended_while_its_run_says_nothing_is_told_by_slurm() -> None:
    jobs = [(chained()[1], JobState("12", "OUT_OF_MEMORY", "OutOfMemory", exit_code="0:125"))]
    why = stages_of(jobs, {}, now("training"), has_data=True)[0].why
    assert why == "OUT_OF_MEMORY, exit code 0:125: it took more memory than it had asked for (OutOfMemory)"


def test_the_job_scripts_own_exit_codes_are_told_in_words() -> None:
    jobs = [(chained()[1], JobState("12", "FAILED", "NonZeroExitCode", exit_code="20:0"))]
    why = stages_of(jobs, {}, now("prepared"), has_data=True)[0].why
    assert why == "FAILED, exit code 20:0: a node cannot do its part, told in its log"


def test_why_a_cancelled_job_had_waited_is_not_told_as_how_it_ended() -> None:
    jobs = [(chained()[1], JobState("12", "CANCELLED", "Resources", exit_code="0:0"))]
    assert stages_of(jobs, {}, now("prepared"), has_data=True)[0].why == "CANCELLED"


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
    begin_attempt(logs, Begun(started_at=1.0))
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
    assert "job 13 evaluate: does not run: job 12 (train) did not end well" in text
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
    assert "state training; job 12 waits in the queue: its earliest start has not come" in text
    assert "killed" not in text


def test_without_slurm_status_tells_what_the_run_folder_says(run: Path, monkeypatch, capsys) -> None:
    def nothing(_: object) -> None:
        raise NoSlurmError("scontrol")

    monkeypatch.setattr(run_state, "with_states", nothing)
    record_end(run, "evaluate", "13", 1)
    text = shown(run, capsys)
    assert "job 12 train: unknown: there is no Slurm here to ask" in text
    assert "job 13 evaluate: did not end well: exit code 1" in text
    assert "the state of its jobs is not known" in text


def test_a_lock_that_a_job_left_does_not_make_its_run_live(run: Path, monkeypatch) -> None:
    (run / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "node9", "since": "x", "job": "12", "chain": "12"}))
    slurm_says(monkeypatch, None, JobState("12", "FAILED"), None, None)
    assert not run_state.is_under_way(run)
    slurm_says(monkeypatch, None, JobState("12", "RUNNING"), None, None)
    assert run_state.is_under_way(run)


# --- submitted again ---


def test_what_is_left_is_submitted_as_before_each_after_the_one_before(run: Path, monkeypatch) -> None:
    typed: list[list[str]] = []
    sent = lambda words: str(typed.append(list(words)) or 50 + len(typed))  # noqa: E731
    monkeypatch.setattr("packhorse.launching.slurm.jobs.submit_script", sent)
    again = submit_again(run, chained()[1:])
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
    monkeypatch.setattr(chain, "live_jobs", lambda _: [*waiting, (records[4], JobState("30", "RUNNING"))])
    monkeypatch.setattr(chain, "depend_on_any", changed.__setitem__)
    assert follow(run, "30", "31") == ["13"]
    assert changed == {"13": ["30", "31"]}
