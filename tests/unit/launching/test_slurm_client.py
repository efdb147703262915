"""How Slurm's programs run: as argument lists, with a timeout, without the variables of a surrounding job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from packhorse.launching.slurm.client import JobState, NoSlurmError, SlurmClient, SlurmError
from packhorse.launching.slurm.jobs import live_jobs
from packhorse.run_folder.jobs import JobRecord, append_job, read_jobs

# Output of slurm 22.05.8.
PENDING = (
    "JobId=12 JobName=first-prepare UserId=root(0) GroupId=root(0) JobState=PENDING Reason=Dependency "
    "Dependency=afterok:11(unfulfilled) Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0 RunTime=00:00:00 "
    "TimeLimit=00:10:00 StartTime=Unknown NodeList= Command=/runs/a b/prepare.sbatch JobName=x prepare"
)
ARRAY = (
    "JobId=13 ArrayJobId=13 ArrayTaskId=2-3%1 JobName=s JobState=PENDING Reason=JobArrayTaskLimit Restarts=0 "
    "StartTime=Unknown NodeList=(null) ExitCode=0:0 TimeLimit=00:01:00\n"
    "JobId=14 ArrayJobId=13 ArrayTaskId=1 JobName=s JobState=RUNNING Reason=None Restarts=0 "
    "StartTime=2026-01-31T09:30:00 NodeList=node[1-2] ExitCode=0:0 TimeLimit=1-00:01:00"
)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace one of Slurm's programs by a script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("sbatch", "scontrol", "sacct", "scancel", "sacctmgr"):
        if any(Path(place, name).exists() for place in ("/usr/bin", "/bin")):
            (folder / name).write_text("#!/bin/sh\nexit 127\n")
            (folder / name).chmod(0o755)

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def test_arguments_reach_sbatch_unchanged(programs, tmp_path: Path) -> None:
    programs("sbatch", f'printf "%s\\n" "$@" > {tmp_path}/words; echo "12;cluster"')
    hostile = ["--x=a b", "$(touch canary)", "a\nb", "'", '"']
    assert SlurmClient().submit(hostile) == "12"
    assert (tmp_path / "words").read_text() == "--parsable\n" + "\n".join(hostile) + "\n"


def test_a_job_does_not_inherit_the_sizes_of_the_job_that_submits_it(programs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "9")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("MINE", "yes")
    programs("sbatch", f"env > {tmp_path}/env; echo 12")
    SlurmClient().submit([])
    given = (tmp_path / "env").read_text()
    assert "SLURM_NNODES" not in given
    assert "SLURM_CONF=/etc/slurm.conf" in given
    assert "MINE=yes" in given


def test_a_refusal_keeps_slurms_output(programs) -> None:
    programs("sbatch", 'echo "sbatch: error: invalid partition specified: x" >&2; echo "Invalid partition" >&2; exit 1')
    with pytest.raises(SlurmError) as raised:
        SlurmClient().estimate_start("#!/bin/bash\n")
    assert raised.value.output == "Invalid partition"


def test_no_slurm_and_no_cluster_are_distinguished(programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs("sbatch", 'echo "sbatch: fatal: Could not establish a configuration source" >&2; exit 1')
    with pytest.raises(NoSlurmError, match="sbatch knows no cluster"):
        SlurmClient().submit([])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoSlurmError, match="no sbatch on PATH"):
        SlurmClient().submit([])


def test_a_silent_controller_ends_in_a_timeout(programs) -> None:
    programs("scontrol", "exec sleep 20")
    with pytest.raises(SlurmError, match="no answer within 0 s"):
        SlurmClient(timeout_seconds=0.2).partitions()


def test_a_waiting_job_in_the_output_of_scontrol(programs) -> None:
    programs("scontrol", f"cat <<'E'\n{PENDING}\nE")
    assert SlurmClient().job_states(["12"]) == {
        "12": JobState("12", "PENDING", "Dependency", None, 2, "", "0:0", "00:10:00"),
    }
    assert SlurmClient().job_states(["12"])["12"].is_waiting


def test_each_task_of_an_array_has_a_state(programs) -> None:
    programs("scontrol", f"cat <<'E'\n{ARRAY}\nE")
    states = SlurmClient().job_states(["13"])
    assert list(states) == ["13_[2-3%1]", "13_1"]
    assert states["13_1"].nodes == "node[1-2]"
    assert states["13_1"].expected_start is not None
    assert (states["13_1"].is_live, states["13_1"].is_waiting) == (True, False)


def test_accounting_knows_a_job_that_the_controller_has_forgotten(programs) -> None:
    programs("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    programs("sacct", "echo '12|CANCELLED by 0|None|2026-01-31T09:30:00|node1|0:15|00:10:00'")
    state = SlurmClient().job_states(["12"])["12"]
    assert (state.state, state.nodes, state.exit_code, state.is_live) == ("CANCELLED", "node1", "0:15", False)
    programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert SlurmClient().job_states(["12"]) == {}


def record(job_id: str, **more: object) -> JobRecord:
    return JobRecord(job_id=job_id, kind="train", submitted_at=1.0, argv=("sbatch",), **more)


def test_a_torn_line_of_jobs_is_skipped(tmp_path: Path) -> None:
    append_job(tmp_path, record("12"))
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"job_id": "13", "ki')
    append_job(tmp_path, record("14", depends_on=("12",)))
    assert [job.job_id for job in read_jobs(tmp_path)] == ["12", "14"]


def test_live_jobs_are_those_that_wait_or_run(programs, tmp_path: Path) -> None:
    for number in ("11", "12"):
        append_job(tmp_path, record(number))
    ended = PENDING.replace("JobId=12", "JobId=11").replace("PENDING", "FAILED")
    programs("scontrol", f'case "${{@: -1}}" in 11) echo "{ended}";; 12) echo "{PENDING}";; esac')
    assert [state.job_id for _, state in live_jobs(tmp_path)] == ["12"]


def test_a_run_without_jobs_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert live_jobs(tmp_path) == []
