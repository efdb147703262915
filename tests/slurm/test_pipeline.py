"""Chains and arrays of jobs on a real controller: what fails stops the rest, `status` says why, `resume` goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from cluster import CHECKOUT, Cluster

from cli import INJECTED, curve
from packhorse.cli.main import main
from packhorse.run_folder.attempts import read_attempts
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.status import read_status
from tiny import write_tiny

SITE = {
    "name": "here",
    "gpus_per_node": 0,
    "cpus_per_node": 1,
    "memory_per_node": "16000M",
    "time": "00:10:00",
    "attempts_without_progress": 1,
    "cpu_jobs": {"cpus": 1, "memory": "16000M", "time": "00:10:00"},
}
ENVIRONMENT = ("PATH", "SLURM_CONF", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see, with a recipe of one process and a profile of the cluster."""
    made = tmp_path_factory.mktemp("chained")
    write_tiny(made, steps=4, evaluation={"max_answered_rows": 0})
    (made / "site.yaml").write_text(yaml.safe_dump(SITE))
    return made


@pytest.fixture
def here(place: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, with Slurm's programs speaking to the cluster."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(place)
    return place


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints, without the spaces that make columns."""
    capsys.readouterr()
    assert main(list(words)) == 0
    return " ".join(capsys.readouterr().out.split())


def last_step(run: Path) -> int:
    """Of the last line of figures; status.json is written anew from time to time only."""
    return max((int(line["step"]) for line in read_metrics(run / METRICS_FILE)), default=0)


def ended(cluster: Cluster, jobs: list[JobRecord]) -> list[str]:
    return [cluster.wait(job.job_id) for job in jobs]


def test_a_stage_that_fails_stops_the_rest_and_resume_goes_on_from_there(
    here: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Four jobs, the second one made to fail in its third step."""
    run = here / "runs" / "chain"
    with monkeypatch.context() as faulty:
        faulty.setenv("PACKHORSE_FAULT", "raise@2:0")
        faulty.setenv("PYTHONPATH", os.pathsep.join(map(str, (INJECTED, CHECKOUT / "src"))))
        assert main(["pipeline", "tiny.yaml", "name=chain"]) == 0
    jobs = read_jobs(run)
    assert [job.kind for job in jobs] == ["prepare", "train", "evaluate", "verify"]
    assert [job.depends_on for job in jobs[1:]] == [(job.job_id,) for job in jobs[:-1]]
    prepare, train, evaluate, verify = (job.job_id for job in jobs)
    assert f"job {train} train: waits: it starts after job {prepare} (prepare) succeeds" in told(
        capsys, "status", "chain"
    )
    assert ended(cluster, jobs) == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"], cluster.told(train)

    text = told(capsys, "status", "chain")
    assert f"job {prepare} prepare: done" in text
    assert f"job {train} train: did not end well: rank 0 failed: RuntimeError: a fault was injected here" in text
    assert f"job {evaluate} evaluate: does not run: job {train} (train) did not succeed" in text
    assert f"job {verify} verify: does not run: job {evaluate} (evaluate) did not run" in text
    assert "failed first rank 0; its last lines" in text
    assert "`packhorse resume runs/chain` resumes from there" in text

    assert f"runs/chain: job {int(verify) + 1} train" in told(capsys, "resume", "chain")
    again = read_jobs(run)[4:]
    assert [job.kind for job in again] == ["train", "evaluate", "verify"], "the data is prepared already"
    assert ended(cluster, again) == ["COMPLETED"] * 3, "\n".join(cluster.told(job.job_id) for job in again)
    assert (run / "evaluation.json").is_file()
    assert len(read_attempts(run)) == 2
    assert len(curve(run)) == 4
    text = told(capsys, "status", "chain")
    assert f"job {again[2].job_id} verify: done" in text
    assert f"jobs before {train} (train), {evaluate} (evaluate), {verify} (verify)" in text
    assert main(["resume", "chain"]) == 2
    assert "runs/chain is finished: all of its jobs succeeded." in capsys.readouterr().err


def test_an_array_trains_a_run_for_each_value_and_status_compares_them(here: Path, cluster: Cluster, capsys) -> None:
    words = ["submit", "tiny.yaml", "name=rates", "--array", "optimizer.learning_rate=1e-2,1e-4", "--at-once", "2"]
    assert main(words) == 0
    array = read_jobs(here / "runs" / "rates")[-1].job_id
    for number in (1, 2):
        assert cluster.wait(f"{array}_{number}") == "COMPLETED", cluster.told(f"{array}_{number}")
    text = told(capsys, "status", "rates")
    for number, rate in ((1, "0.01"), (2, "0.0001")):
        loss = curve(here / "runs" / f"rates-{number}")[-1]
        assert f"rates-{number} optimizer.learning_rate={rate} finished step 4 of 4 {loss:.4g}" in text
    assert "lowest evaluation/loss: runs/rates-1," in text
    assert (here / "runs" / "rates-2" / "logs" / f"job-{array}_2.out").is_file()
    assert "==> runs/rates-2/logs/" in told(capsys, "logs", "rates-2")
    assert main(["resume", "rates"]) == 0
    assert "runs that are finished already: 2" in capsys.readouterr().out


def test_a_run_that_is_cancelled_saves_ends_and_goes_on(here: Path, cluster: Cluster, capsys) -> None:
    assert main(["submit", "tiny.yaml", "name=long", "steps=100000"]) == 0
    run = here / "runs" / "long"
    job = read_jobs(run)[-1].job_id
    cluster.wait_until(lambda: last_step(run) >= 2, 120, lambda: cluster.told(job))
    assert "is asked to save and stop" in told(capsys, "cancel", "long")
    assert cluster.wait(job) == "FAILED", "exit code 75: it is not finished, and not queued again"
    now = read_status(run)
    assert (now.state, now.step >= 2) == ("stopped", True)

    assert main(["resume", "long"]) == 0
    again = read_jobs(run)[-1].job_id
    cluster.wait_until(lambda: last_step(run) > now.step, 120, lambda: cluster.told(again))
    assert main(["resume", "long"]) == 2
    assert f"is submitted already: job {again} (train) is running" in capsys.readouterr().err
    assert main(["cancel", "long", "--now"]) == 0
    cluster.wait(again)
    assert json.loads(cluster.ask("squeue", "-h", "-j", again, "-o", "1").strip() or "0") == 0, "queued again"
    assert main(["cancel", "long"]) == 2
    assert "nothing of runs/long runs or waits." in capsys.readouterr().err


def test_a_gate_that_is_not_met_stops_what_follows(here: Path, cluster: Cluster, capsys) -> None:
    gate = "evaluation.gate=[{metric: loss, min_gain: 100}]"
    assert main(["pipeline", "tiny.yaml", "name=gated", gate]) == 0
    jobs = read_jobs(here / "runs" / "gated")
    evaluate, verify = jobs[-2], jobs[-1]
    assert (evaluate.kind, verify.kind) == ("evaluate", "verify")
    assert ended(cluster, jobs)[-2:] == ["FAILED", "CANCELLED"], cluster.told(evaluate.job_id)
    found = json.loads((here / "runs" / "gated" / "evaluation.json").read_text())
    assert found["decision"] == "NO-GO"
    text = told(capsys, "status", "gated")
    assert f"job {evaluate.job_id} evaluate: did not end well: gate: NO-GO" in text
    assert f"job {verify.job_id} verify: does not run: job {evaluate.job_id} (evaluate) did not succeed" in text
