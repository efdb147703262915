"""A first site profile from what Slurm reports: it loads, and what Slurm cannot know is commented out."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.launching.slurm import site_probe
from packhorse.launching.slurm.client import NoSlurmError, SlurmClient
from packhorse.launching.slurm.site import load_site

GPU = {"CPUTot": "128", "RealMemory": "1031000", "Gres": "gpu:a100:8(S:0-1)", "AvailableFeatures": "a100,ib"}
CPU = {"CPUTot": "4", "RealMemory": "9000", "Gres": "(null)", "AvailableFeatures": "(null)"}
PARTITIONS = [
    {"PartitionName": "std", "Default": "YES", "State": "UP", "Nodes": "c[1-2]", "MaxTime": "UNLIMITED"},
    {"PartitionName": "gpu", "State": "UP", "Nodes": "g[1-2]", "MaxTime": "12:00:00", "AllowAccounts": "lab,other"},
]
NODES = [
    {**GPU, "NodeName": "g1", "Partitions": "gpu"},
    {**GPU, "NodeName": "g2", "Partitions": "gpu"},
    {**CPU, "NodeName": "c1", "Partitions": "std"},
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlurmClient, "partitions", lambda _: PARTITIONS)
    monkeypatch.setattr(SlurmClient, "nodes", lambda _: NODES)
    monkeypatch.setattr(SlurmClient, "associations", lambda _: [("lab", "", ("normal", "long")), ("mine", "", ())])


def loaded(text: str, folder: Path):
    path = folder / "probed.yaml"
    path.write_text(text)
    return load_site(str(path))


def test_a_partition_with_gpus_is_preferred_to_the_default(cluster: None, tmp_path: Path) -> None:
    text = site_probe.probe_site("", "")
    site = loaded(text, tmp_path)
    assert (site.name, site.partition, site.account) == ("gpu", "gpu", "lab")
    assert (site.gpus_per_node, site.gpu_type, site.cpus_per_gpu) == (8, "a100", 16)
    assert site.memory_per_gpu == f"{1031000 * 95 // 100 // 8}M"
    assert (site.time, site.longest_time) == ("12:00:00", "12:00:00")
    assert (site.cpu_jobs.partition, site.cpu_jobs.cpus, site.cpu_jobs.time) == ("std", 4, "04:00:00")
    assert "# constraint: a100" in text
    assert "features of the nodes: a100, ib" in text
    assert "you may set long, normal" in text


def test_each_line_is_explained(cluster: None) -> None:
    lines = site_probe.probe_site("", "").splitlines()
    assert [line for line in lines if " # " not in line and not line.startswith("# ")] == []


def test_nodes_without_gpus(cluster: None, tmp_path: Path) -> None:
    site = loaded(site_probe.probe_site("123", "std"), tmp_path)
    assert (site.name, site.gpus_per_node, site.cpus_per_node, site.time) == ("123", 0, 4, "24:00:00")
    assert (site.longest_time, site.account) == (None, None)


def test_jobs_that_prepare_data_respect_a_short_limit(cluster: None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(SlurmClient, "partitions", lambda _: [{**PARTITIONS[0], "MaxTime": "01:00:00"}])
    assert loaded(site_probe.probe_site("", ""), tmp_path).cpu_jobs.time == "01:00:00"


def test_a_partition_that_is_not_there(cluster: None) -> None:
    with pytest.raises(UserError, match="give one of std, gpu"):
        site_probe.probe_site("", "gp u")


def test_no_file_is_overwritten_and_none_written_without_slurm(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoSlurmError):
        site_probe.probe_site("", "")
    assert main(["site"]) == 2
    assert not (tmp_path / "site.yaml").exists()
    (tmp_path / "site.yaml").write_text("mine")
    assert main(["site"]) == 2
    assert "site.yaml exists already" in capsys.readouterr().err
    assert (tmp_path / "site.yaml").read_text() == "mine"
