"""`packhorse submit` on a real controller: what it sends trains, what Slurm refuses is told in the user's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from cluster import Cluster

from cli import curve, packhorse
from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.launching.local.environment import FOLDER_VARIABLE, extensions_folder
from packhorse.launching.slurm.site import load_site
from packhorse.launching.slurm.submit import check_jobs, send
from packhorse.run_folder.jobs import read_jobs
from packhorse.run_folder.lock import launcher_lock
from packhorse.run_folder.status import read_status
from packhorse.workflows.submit_run import SubmitRequest, planned_jobs, submission
from tiny import write_tiny

SITE = {
    "name": "here",
    "gpus_per_node": 0,
    "cpus_per_node": 2,
    "memory_per_node": "16000M",
    "time": "00:10:00",
    "cpu_jobs": {"cpus": 1, "memory": "16000M", "time": "00:10:00"},
}
NASTY = "$(touch canary1) `touch canary2` '; touch canary3; ' \"; touch canary4"
SHORT = ("steps=6", "checkpoint.every_steps=null", "evaluation.every_steps=null")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of four processes and a profile of the cluster; Slurm's programs speak to it."""
    for name in ("PATH", "SLURM_CONF", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE"):
        monkeypatch.setenv(name, cluster.environment[name])
    # DeepSpeed's parts are built once for this environment, and not by each job anew.
    monkeypatch.setenv(FOLDER_VARIABLE, str(extensions_folder()))
    made = tmp_path_factory.mktemp("submitted")
    monkeypatch.chdir(made)
    write_tiny(made, parallel={"processes": 4})
    write_site(made)
    return made


def write_site(folder: Path, **fields: object) -> None:
    (folder / "site.yaml").write_text(yaml.safe_dump({**SITE, **fields}))


def test_what_is_submitted_trains_with_and_without_a_job_that_prepares(folder: Path, cluster: Cluster, capsys) -> None:
    words = ["submit", "tiny.yaml", "--nodes", "2", *SHORT]
    # Each command in a container, and text that would leave a file behind if any shell ran it.
    write_site(folder, environment={"GIVEN": NASTY}, container=["env", f"WRAPPED={NASTY}"])
    assert main([*words, "name=ddp"]) == 0
    prepare, train = read_jobs(folder / "runs" / "ddp")
    assert (prepare.kind, train.kind, train.depends_on) == ("prepare", "train", (prepare.job_id,))
    assert f"job {train.job_id}" in capsys.readouterr().out
    assert main(["submit", "runs/ddp"]) == 2
    assert "runs/ddp is submitted already: job" in capsys.readouterr().err

    assert cluster.wait(prepare.job_id) == "COMPLETED", cluster.told(prepare.job_id)
    assert main([*words, "name=zero2", "parallel.engine=zero2"]) == 0
    (only,) = read_jobs(folder / "runs" / "zero2")
    assert packhorse(folder, "train", "tiny.yaml", "name=alone", "parallel.processes=1", *SHORT).code == 0
    for run, job in (("ddp", train), ("zero2", only)):
        assert cluster.wait(job.job_id) == "COMPLETED", cluster.told(job.job_id)
        assert curve(folder / "runs" / run) == pytest.approx(curve(folder / "runs" / "alone"), abs=1e-5, rel=0), run
        assert read_status(folder / "runs" / run).state == "finished"
    assert [str(path) for path in folder.rglob("canary*")] == []
    assert main(["submit", "runs/ddp"]) == 2
    assert "runs/ddp is finished: 6 of 6 steps are done." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("site", "words", "fact", "fix"),
    [
        ({"partition": "nope"}, [], "partition is nope.", "one of debug, low, high, team."),
        ({"constraint": "h100"}, [], "constraint is h100.", "remove constraint from here"),
        ({"cpus_per_node": 99}, [], "requests 99 CPUs per node, and the largest node here has 4", "it is 4 or less"),
        ({"memory_per_node": "1T"}, [], "requests 1,048,576 MiB per node", "is 64000M or less"),
        ({"gpus_per_node": 9, "cpus_per_node": None}, ["batch.packs=9"], "requests 9 GPUs per node", "to 2 or less"),
        ({}, ["--nodes", "4"], "requests 4 nodes, and partition debug has 2.", "set --nodes to 2 or less"),
        ({}, ["--time", "01:00:01"], "partition debug allows 01:00:00.", "set --time to 01:00:00 or less"),
        ({"options": ["--reservation=nope"]}, [], "options is --reservation=nope.", "change options of here"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_refusal_names_the_field_and_what_the_site_takes(
    site: dict[str, object], words: list[str], fact: str, fix: str, folder: Path, capsys
) -> None:
    write_site(folder, **site)
    assert main(["submit", "tiny.yaml", *words]) == 2
    told = capsys.readouterr().err
    assert fact in told
    assert fix in told
    assert not (folder / "runs" / "tiny").exists(), "nothing is made of what is refused"


def test_of_two_submissions_at_once_one_is_sent(folder: Path, cluster: Cluster, capsys) -> None:
    write_site(folder, options=["--hold"])
    assert main(["submit", "tiny.yaml"]) == 0
    run = folder / "runs" / "tiny"
    found = submission("runs/tiny", [], SubmitRequest())
    jobs = planned_jobs(found)
    # The other one has looked for live jobs before this one sent its own.
    with pytest.raises(UserError, match="runs/tiny is submitted already: job"):
        send(run, jobs, check_jobs(found.site, jobs))
    assert len(read_jobs(run)) == 2
    cluster.ask("scancel", *(job.job_id for job in read_jobs(run)))
    queued = ("squeue", "-h", "--name=tiny,tiny-prepare", "-o", "%i %T")
    cluster.wait_until(lambda: not cluster.ask(*queued), 60, lambda: cluster.ask(*queued))
    with launcher_lock(run):
        assert main(["submit", "runs/tiny"]) == 2
    assert "tiny is run by process" in capsys.readouterr().err
    assert len(read_jobs(run)) == 2
    assert cluster.ask(*queued) == ""


def test_a_first_profile_of_the_cluster_can_be_submitted_with(folder: Path, capsys) -> None:
    assert main(["site", "probed.yaml"]) == 0
    site = load_site("probed.yaml")
    assert (site.partition, site.gpus_per_node, site.gpu_type, site.cpus_per_gpu) == ("debug", 2, "fake", 2)
    assert site.longest_time == "01:00:00"
    write = json.loads(site.model_dump_json()) | {"options": ["--hold"], "gpu_type": None}
    (folder / "held.yaml").write_text(yaml.safe_dump({key: value for key, value in write.items() if value is not None}))
    capsys.readouterr()
    assert main(["submit", "tiny.yaml", "--site", "held.yaml", "name=probed"]) == 0
    assert "1 x 2 cuda, ddp" in capsys.readouterr().out
    assert main(["cancel", "runs/probed"]) == 0
