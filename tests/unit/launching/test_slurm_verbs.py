"""`cancel`, `logs`, `resume` and sweeps: requests to Slurm, messages, and files in the run folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching_cases import planned

from packhorse.cli import logs as logs_command
from packhorse.cli import submit as submit_command
from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.launching.slurm.client import JobState, SlurmClient, SlurmError, StartEstimate
from packhorse.launching.slurm.job_reports import find_state
from packhorse.plan.run_plan import read_plan
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import expand
from packhorse.run_folder.attempts import AttemptStart, write_attempt_start
from packhorse.run_folder.folder import check_free
from packhorse.run_folder.jobs import JobKind, JobRecord, append_job, read_jobs
from packhorse.run_folder.layout import LOCK_FILE
from packhorse.run_folder.status import Status, write_status
from packhorse.run_folder.sweep import create_sweep
from packhorse.workflows import cancel_run, resume_run, run_state, submit_run
from packhorse.workflows.new_run import RunEnd
from tiny import write_tiny

SCRIPTS = (("prepare", "prepare"), ("train", "job"), ("evaluate", "evaluate"), ("verify", "verify"))
SITE = {"name": "here", "gpus_per_node": 0, "cpus_per_node": 2, "time": "00:10:00"}


def job(job_id: str, kind: JobKind, *depends_on: str) -> JobRecord:
    argv = ("sbatch", "--parsable", f"{kind}.sbatch", "RUN")
    return JobRecord(job_id=job_id, kind=kind, submitted_at=0.0, argv=argv, depends_on=depends_on)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(planned(tmp_path).run_folder)


# --- cancel ---


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that Slurm was asked to end."""
    found: list[str] = []
    monkeypatch.setattr(SlurmClient, "cancel", lambda _, job_ids: found.extend(job_ids))
    return found


def live(monkeypatch: pytest.MonkeyPatch, folder: Path, *jobs: tuple[JobRecord, str]) -> None:
    for record, _ in jobs:
        append_job(folder, record)
    states = [(record, JobState(record.job_id, state)) for record, state in jobs]
    monkeypatch.setattr(cancel_run, "live_jobs", lambda _: states)


@pytest.mark.parametrize("now", [False, True], ids=["with a save", "at once"])
def test_what_trains_may_save_first_and_what_waits_for_it_leaves_the_queue(
    run: Path, monkeypatch, ended: list[str], capsys, now: bool
) -> None:
    live(
        monkeypatch,
        run,
        (job("1", "train"), "RUNNING"),
        (job("2", "evaluate", "1"), "PENDING"),
        (job("3", "verify", "2"), "PENDING"),
    )
    assert main(["cancel", str(run), *["--now"] * now]) == 0
    assert ended == (["3", "2", "1"] if now else ["3", "2"])
    assert (run / "STOP").exists() is not now
    assert (run / "CANCEL").exists(), "its job would queue itself again"
    out = capsys.readouterr().out
    assert ("job 1 is asked to save and stop" in out) is not now
    assert f"to resume: packhorse resume {run}" in out


def test_a_job_that_waits_to_train_is_not_asked_to_save(run: Path, monkeypatch, ended: list[str]) -> None:
    live(monkeypatch, run, (job("1", "train"), "PENDING"))
    assert main(["cancel", str(run)]) == 0
    assert ended == ["1"]
    assert not (run / "STOP").exists(), "the next attempt would stop at once"


def test_of_a_sweep_only_the_runs_that_train_are_asked_to_save(
    tmp_path: Path, monkeypatch, ended: list[str], slurm: list[list[str]]
) -> None:
    """The third run waits in its array; the second one was resumed and has a job of its own beside it."""
    folder = sweep_of_three(tmp_path)
    for number in (1, 2, 3):
        append_job(tmp_path / f"s-{number}", job(f"7_{number}", "train"))
    append_job(tmp_path / "s-2", job("9", "train"))
    states = {"7_1": "COMPLETING", "7_2": "FAILED", "7_[3]": "PENDING", "9": "RUNNING"}
    asked: list[str] = []
    slurm_knows(monkeypatch, asked, states)
    assert main(["cancel", str(folder)]) == 0
    assert asked == ["7", "9"], "Slurm is asked once for an array"
    assert [(tmp_path / f"s-{each}" / "STOP").exists() for each in (1, 2, 3)] == [False, True, False]
    assert ended == ["7_3", "7_1"]
    assert main(["resume", str(folder)]) == 0
    assert slurm == []


def slurm_knows(monkeypatch: pytest.MonkeyPatch, asked: list[str], states: dict[str, str]) -> None:
    def job_states(_: SlurmClient, ids: list[str]) -> dict[str, JobState]:
        asked.extend(ids)
        return {job_id: JobState(job_id, state) for job_id, state in states.items()}

    monkeypatch.setattr(SlurmClient, "job_states", job_states)


@pytest.mark.parametrize(
    ("job_id", "group"),
    [
        ("7_2", "7_2"),
        ("7_4", "7_[3-5,8%2]"),
        ("7_8", "7_[3-5,8%2]"),
        ("7_6", None),
        ("70_4", None),
        ("7_13", "7_[11-15:2]"),
    ],
)
def test_a_task_that_waits_with_others_has_their_state(job_id: str, group: str | None) -> None:
    names = ("7_2", "7_[3-5,8%2]", "7_[11-15:2]", "8")
    state = find_state(job_id, {name: JobState(name, "PENDING") for name in names})
    assert (state.job_id if state else None) == group


def test_there_is_nothing_to_cancel_where_nothing_runs(run: Path) -> None:
    with pytest.raises(UserError, match="nothing of .* runs or waits"):
        cancel_run.cancel(str(run))


LAUNCHER = """
import signal, sys, time
from pathlib import Path
from packhorse.run_folder.lock import launcher_lock
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
with launcher_lock(Path(sys.argv[1])):
    print("up", flush=True)
    while len(asked) < int(sys.argv[2]):
        time.sleep(0.01)
    time.sleep(0.2)
sys.exit(70 + len(asked))
"""
"""Ends once it was asked as often as is said, with 70 and how often it was."""


@pytest.mark.parametrize(
    ("now", "asked", "how"), [(False, 1, "is asked to save and stop"), (True, 2, "ends its ranks")]
)
def test_a_run_that_was_started_here_is_stopped_by_signals_to_its_launcher(
    run: Path, capsys, now: bool, asked: int, how: str
) -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, str(run), str(asked)], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        try:
            assert main(["cancel", str(run), *["--now"] * now]) == 0
            assert launcher.wait(20) == 70 + asked
        finally:
            launcher.kill()
    out = capsys.readouterr().out
    assert f"process {launcher.pid} {how}" in out
    assert f"to resume: packhorse resume {run}" in out


def test_a_launcher_on_another_host_is_asked_by_a_file(run: Path, capsys) -> None:
    (run / "launcher.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "x"}))
    assert main(["cancel", str(run)]) == 0
    assert (run / "STOP").exists()
    with pytest.raises(UserError, match="is run by process 1 on elsewhere"):
        cancel_run.cancel(str(run), now=True)


# --- logs ---


def said(run: Path, attempt: int, **files: str) -> None:
    logs = run / "logs" / f"attempt-{attempt}"
    logs.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with (logs / f"{name.replace('_', '-')}.log").open("a") as file:
            file.write(text)


def test_logs_shows_the_job_the_launcher_and_rank_0_of_the_newest_attempt(run: Path, capsys) -> None:
    said(run, 9, rank_0="old\n")
    said(run, 10, rank_0="new\n", rank_1="other\n", stderr="agent\n")
    (run / "logs" / "job-5.out").write_text("srun ended\n")
    assert logs_command.logs(str(run)) == 0
    logs = run / "logs"
    assert capsys.readouterr().out == (
        f"==> {logs}/job-5.out <==\nsrun ended\n"
        f"\n==> {logs}/attempt-10/stderr.log <==\nagent\n"
        f"\n==> {logs}/attempt-10/rank-0.log <==\nnew\n"
    )


def test_logs_of_one_rank_are_as_it_wrote_them(run: Path, capsys) -> None:
    said(run, 1, rank_0="zero\n", rank_1="one\n")
    assert logs_command.logs(str(run), rank=1) == 0
    assert capsys.readouterr().out == "one\n"
    with pytest.raises(UserError, match="ranks 0 to 1 have one"):
        logs_command.logs(str(run), rank=2)


def test_a_run_that_has_said_nothing_is_told_so(run: Path) -> None:
    with pytest.raises(UserError, match="has no log yet"):
        logs_command.logs(str(run))


def test_following_goes_on_into_the_next_attempt_and_ends_with_the_run(run: Path, monkeypatch, capsys) -> None:
    said(run, 1, rank_0="first\n")
    happens = iter([lambda: said(run, 1, rank_0="more\n"), lambda: said(run, 2, rank_0="second\n"), None])

    def is_under_way(_: Path) -> bool:
        event = next(happens)
        if event is not None:
            event()
        return event is not None

    monkeypatch.setattr(logs_command, "is_under_way", is_under_way)
    monkeypatch.setattr(logs_command, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(logs_command, "OVER_SECONDS", 0.0)
    assert logs_command.logs(str(run), rank=0, follow=True) == 0
    assert capsys.readouterr().out == "first\nmore\nsecond\n"


# --- resume ---


def test_a_run_that_runs_as_jobs_takes_no_overrides(run: Path) -> None:
    append_job(run, job("1", "train"))
    with pytest.raises(UserError, match=r"resume came with batch\.micro=1 --gpus 2"):
        resume_run.resume(str(run), ["batch.micro=1"], 2, None, False)


def test_a_run_that_was_started_here_goes_on_here(run: Path, monkeypatch) -> None:
    seen: dict[str, object] = {}

    def resume_here(name, overrides, gpus, restarts, force, reporter) -> RunEnd:
        seen.update(gpus=gpus, restarts=restarts, force=force)
        return RunEnd(None, 0)

    monkeypatch.setattr(resume_run, "resume_here", resume_here)
    for words in (["resume", str(run)], ["train", str(run), "--resume"]):
        assert main([*words, "--gpus", "2", "--restarts", "3", "--force"]) == 0
        assert seen == {"gpus": 2, "restarts": 3, "force": True}
        seen.clear()


def test_a_run_whose_job_was_submitted_by_hand_does_not_go_on_here_unasked(run: Path, monkeypatch) -> None:
    said(run, 1, rank_0="x")
    write_attempt_start(run / "logs" / "attempt-1", AttemptStart(started_at=1.0, chain="77"))
    append_job(run, job("78", "train").model_copy(update={"goes_on_from": "77"}))
    with pytest.raises(UserError, match=r"ran in Slurm job 77, which was submitted by hand") as caught:
        resume_run.resume(str(run), [], None, None, False)
    assert f"slurm/job.sbatch {run}" in str(caught.value)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is handed to sbatch; jobs are numbered from 101, and nothing that was submitted lives."""
    typed: list[list[str]] = []

    def submit(_: SlurmClient, words: list[str]) -> str:
        typed.append(list(words))
        return str(100 + len(typed))

    monkeypatch.setattr(SlurmClient, "submit", submit)
    monkeypatch.setattr("packhorse.launching.slurm.submit.refuse_live", lambda _: None)
    for module in (resume_run, run_state):
        monkeypatch.setattr(module, "with_states", lambda records: [(record, None) for record in records])
    monkeypatch.setattr(SlurmClient, "job_states", lambda *_: {})
    for module in (submit_command, submit_run):
        monkeypatch.setattr(module, "check_jobs", lambda _, jobs: [StartEstimate(None, "", "") for _ in jobs])
    return typed


def test_a_finished_run_and_a_cancelled_one(run: Path, slurm: list[list[str]], capsys) -> None:
    append_job(run, job("1", "train"))
    (run / "CANCEL").touch()
    write_status(run, Status(state="stopped", step=3, num_steps=40, attempt=1))
    assert main(["resume", str(run)]) == 0
    assert slurm == [["train.sbatch", "RUN"]]
    assert not (run / "CANCEL").exists(), "the job would end before it began"
    assert f"{run}: job 101 train" in capsys.readouterr().out
    write_status(run, Status(state="finished", step=40, num_steps=40, attempt=1))
    with pytest.raises(UserError, match="is finished"):
        resume_run.resume(str(run), [], None, None, False)


@pytest.mark.parametrize(("state", "code"), [("CANCELLED", 0), ("RUNNING", 2), (None, 2)])
def test_a_job_that_was_ended_hard_holds_its_run_no_longer_than_slurm_says(
    run: Path, slurm: list[list[str]], monkeypatch, state: str | None, code: int
) -> None:
    """A task of an array is known by another name than its number; of a forgotten job the ranks' silence decides."""
    append_job(run, job("7_2", "train"))
    said(run, 1, rank_0="x")
    (run / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "n", "since": "x", "job": "9", "chain": "9"}))
    found = {"7_2": JobState("7_2", state)} if state else {}
    monkeypatch.setattr(SlurmClient, "job_states", lambda _, ids: found if ids == ["9"] else {})
    assert main(["resume", str(run)]) == code
    assert len(slurm) == (1 if code == 0 else 0)


# --- sweeps ---


def sweep_of_three(folder: Path) -> Path:
    """A sweep whose runs finished, failed and never began."""
    fields = {"data": {"sources": [{"path": "r.jsonl"}]}}
    for number in (1, 2, 3):
        planned(folder, name=f"s-{number}", **fields)
    recipe = load_recipe(str(write_tiny(folder)), ["sweep.grid.seed=[1, 2, 3]", "name=s"])
    create_sweep(folder / "s", "tiny.yaml", expand(recipe))
    return folder / "s"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_tiny(tmp_path)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))
    return tmp_path


def test_a_sweep_becomes_one_array_whose_tasks_each_have_a_run_of_their_own(
    here: Path, slurm: list[list[str]], capsys
) -> None:
    words = ["submit", "tiny.yaml", "--array", "optimizer.learning_rate=1e-3,1e-4,1e-5"]
    assert main(words) == 0
    runs = here / "runs"
    prepare = [f"{runs}/tiny/prepare.sbatch", "prepare", f"{runs}/tiny"]
    chained = ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"]
    array = ["--array=1-3", f"--output={runs}/tiny-%a/logs/job-%A_%a.out", f"{runs}/tiny/job.sbatch", f"{runs}/tiny"]
    assert slurm == [prepare, [*chained, *array]]
    assert [read_plan(runs / f"tiny-{n}").recipe.optimizer.learning_rate for n in (1, 2, 3)] == [1e-3, 1e-4, 1e-5]
    assert [record.job_id for record in read_jobs(runs / "tiny-2")] == ["101", "102_2"]
    out = capsys.readouterr().out
    assert "run 2 tiny-2: optimizer.learning_rate=0.0001" in " ".join(out.split())
    assert main(["submit", "tiny.yaml", "--array", "seed=1,2"]) == 2
    assert "runs/tiny holds files already" in capsys.readouterr().err


def test_folds_become_one_array_over_their_names(here: Path, slurm: list[list[str]]) -> None:
    assert main(["submit", "tiny.yaml", "sweep.folds=2"]) == 0
    runs = here / "runs"
    output, script, run = slurm[-1][-3:]
    assert (output, script) == (f"--output={runs}/tiny-fold-%a/logs/job-%A_%a.out", f"{runs}/tiny/job.sbatch")
    # slurm/job.sbatch adds -1 and -2.
    assert [read_plan(Path(f"{run}-{n}")).recipe.data.split.fold for n in (1, 2)] == [(1, 2), (2, 2)]
    assert [record.job_id for record in read_jobs(runs / "tiny-fold-2")] == ["101", "102_2"]


def test_so_many_runs_of_a_sweep_run_at_once(here: Path, slurm: list[list[str]], capsys) -> None:
    for words, said in (
        (["--at-once", "2"], "--at-once is 2, and tiny.yaml is one run."),
        (["--array", "seed=1,2,3", "--at-once", "0"], "--at-once is 0."),
        (["--array", "seed=1,2,3", "--atonce", "2"], "did you mean --at-once?"),
    ):
        assert main(["submit", "tiny.yaml", *words]) == 2
        assert said in capsys.readouterr().err
    assert slurm == []
    words = ["submit", "tiny.yaml", "--array", "seed=1,2,3", "--at-once", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert " --array=1-3%2 " in capsys.readouterr().out
    assert main(words) == 0
    assert "--array=1-3%2" in slurm[-1]


def test_a_run_of_a_sweep_goes_on_alone_with_a_log_of_its_own(here: Path, slurm: list[list[str]]) -> None:
    assert main(["submit", "tiny.yaml", "--array", "seed=1,2"]) == 0
    runs = here / "runs"
    write_status(runs / "tiny-1", Status(state="finished", step=6, num_steps=6, attempt=1))
    slurm.clear()
    plan = read_plan(runs / "tiny-2")
    assert plan.data is None
    assert main(["resume", "tiny"]) == 0
    log = f"--output={runs}/tiny-2/logs"
    assert slurm == [
        [f"{log}/prepare-%j.out", f"{runs}/tiny/prepare.sbatch", "prepare", f"{runs}/tiny-2"],
        [
            "--dependency=afterok:101",
            "--kill-on-invalid-dep=yes",
            f"{log}/job-%j.out",
            f"{runs}/tiny/job.sbatch",
            f"{runs}/tiny-2",
        ],
    ]


def test_a_sweep_that_slurm_refuses_leaves_nothing_behind(here: Path, slurm: list[list[str]], monkeypatch) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(SlurmClient, "cancel", lambda _, job_ids: cancelled.extend(job_ids))

    def refuse(_: SlurmClient, words: list[str]) -> str:
        if "--array=1-2" in words:
            raise SlurmError(
                "sbatch", "Batch job submission failed: Invalid job array specification", "see `man sbatch`."
            )
        return "101"

    monkeypatch.setattr(SlurmClient, "submit", refuse)
    assert main(["submit", "tiny.yaml", "--array", "seed=1,2"]) == 2
    assert cancelled == ["101"]
    assert [path.name for path in (here / "runs").glob("tiny*")] == []
    check_free(here / "runs" / "tiny")


def test_runs_that_ask_for_other_nodes_are_no_array(here: Path, slurm: list[list[str]], capsys) -> None:
    assert main(["submit", "tiny.yaml", "--array", "parallel.processes=1,2"]) == 2
    assert "tiny-1 runs on 1 x 1 processes and tiny-2 on 1 x 2." in capsys.readouterr().err
    assert slurm == []


def test_status_of_a_sweep_is_a_table_over_its_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = sweep_of_three(tmp_path)
    write_status(tmp_path / "s-1", Status(state="finished", step=40, num_steps=40, attempt=1))
    write_status(tmp_path / "s-2", Status(state="failed", step=7, num_steps=40, attempt=2, message="rank 0 failed: x"))
    for number, losses in ((1, (3.0, 2.5)), (2, (3.0, 2.75))):
        lines = [{"step": at, "train/loss": loss, "evaluation/loss": loss + 1} for at, loss in enumerate(losses)]
        (tmp_path / f"s-{number}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in (1, 2, 3):
        append_job(tmp_path / f"s-{number}", job(f"9_{number}", "train"))
    slurm_knows(monkeypatch, [], {"9_2": "FAILED", "9_[3]": "PENDING"})
    assert main(["status", str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"sweep {folder}, 3 runs"
    assert "s-1 seed=1 finished step 40 of 40 2.5 3.5 *" in lines
    assert "s-2 seed=2 did not end well: rank 0 failed: x step 7 of 40 2.75 3.75" in lines
    assert "s-3 seed=3 waits" in lines
    assert lines[-1] == f"lowest evaluation/loss: {tmp_path}/s-1, 3.5"


@pytest.mark.parametrize("words", [["logs"], ["verify"], ["chat"], ["submit"], ["train", "--resume"]])
def test_what_takes_one_run_says_that_a_sweep_is_many(words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    sweep_of_three(tmp_path / "runs")
    for name in ("s", "runs/s", str(tmp_path / "runs" / "s")):
        assert main([words[0], name, *words[1:]]) == 2
        told = capsys.readouterr().err
        assert "runs/s is a sweep, not a run." in told
        assert "name one of them, such as runs/s-1." in told


# --- pipelines ---


def test_a_pipeline_evaluates_on_one_gpu_and_verifies_on_none_each_after_the_one_before(here: Path, capsys) -> None:
    (here / "site.yaml").write_text(yaml.safe_dump({"name": "gpus", "gpus_per_node": 4, "cpus_per_gpu": 3}))
    assert main(["pipeline", "tiny.yaml", "--nodes", "2", "--force", "--dry-run"]) == 0
    scripts, commands = capsys.readouterr().out.split("# commands\n")
    run = here / "runs" / "tiny"
    by_kind = {
        kind: scripts.split(f"# {run}/{name}.sbatch\n")[1].split("set -uo pipefail")[0] for kind, name in SCRIPTS
    }
    assert "--gpus-per-node=4" in by_kind["train"]
    assert "--gpus-per-node=1\n#SBATCH --cpus-per-task=3\n" in by_kind["evaluate"]
    assert not any("gpus" in by_kind[kind] for kind in ("prepare", "verify"))
    chain = [("prepare", "prepare "), ("job", ""), ("evaluate", "evaluate "), ("verify", "verify ")]
    typed = [f"{run}/{script}.sbatch {words}{run}" for script, words in chain]
    after = ["", *(f"--dependency=afterok:JOB_{kind} --kill-on-invalid-dep=yes " for kind, _ in SCRIPTS[:3])]
    assert commands.splitlines() == [f"sbatch --parsable {a}{words}" for a, words in zip(after, typed, strict=True)]
    assert not run.exists()
    # A model whose weights training shards is measured on the GPUs of a node.
    assert main(["pipeline", "tiny.yaml", "parallel.engine=fsdp2", "--nodes", "2", "--force", "--dry-run"]) == 0
    sharded = capsys.readouterr().out.split(f"# {run}/evaluate.sbatch\n")[1].split("set -uo pipefail")[0]
    assert "--gpus-per-node=4" in sharded
