"""Slurm's refusals in the user's words, with the values that the site takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from packhorse.launching.slurm import refusals
from packhorse.launching.slurm.client import SlurmError
from packhorse.launching.slurm.script import JobRequest, train_request
from packhorse.launching.slurm.site import SiteProfile

PARTITIONS = [
    {"PartitionName": "gpu", "State": "UP", "MaxTime": "2-00:00:00", "TotalNodes": "2", "AllowAccounts": "lab"},
    {"PartitionName": "cpu", "State": "UP", "MaxTime": "UNLIMITED", "TotalNodes": "9", "Default": "YES"},
    {"PartitionName": "old", "State": "DOWN", "MaxTime": "10:00", "TotalNodes": "1"},
]
NODE = {"CPUTot": "64", "RealMemory": "500000", "Gres": "gpu:a100:4(S:0-1)", "Partitions": "gpu", "State": "IDLE"}
NODES = [
    {"NodeName": "g1", **NODE, "AvailableFeatures": "a100,ib"},
    {"NodeName": "g2", **NODE, "AvailableFeatures": "a100,ib"},
    {"NodeName": "c1", "CPUTot": "8", "RealMemory": "9000", "Gres": "(null)", "Partitions": "cpu", "State": "IDLE"},
]
SITE = SiteProfile(name="here", partition="gpu", account="lab", gpus_per_node=4)
ASKED = train_request(SITE, "first", Path("/runs/first/logs"), 2, 4, "24:00:00", 180)


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "partitions", lambda: PARTITIONS)
    monkeypatch.setattr(refusals, "nodes", lambda: NODES)
    monkeypatch.setattr(refusals, "associations", lambda: [("lab", "", ("normal", "long")), ("open", "", ("normal",))])


def told(said: str, site: SiteProfile = SITE, asked: JobRequest = ASKED) -> str:
    return str(refusals.explain_refusal(SlurmError("sbatch", said, ""), site, asked))


@pytest.mark.parametrize(
    ("said", "changes", "fact", "fix"),
    [
        ("Invalid partition name specified", {"partition": "gpuu"}, "partition is gpuu", "one of gpu, cpu."),
        ("Invalid account or account/partition combination specified", {}, "account is lab.", "one of lab, open."),
        ("Invalid qos specification", {"qos": "fast"}, "qos is fast", "one of long, normal."),
        ("Invalid --time specification", {}, "asks for 24:00:00", "gpu 2-00:00:00"),
        ("Requested time limit is invalid (missing or exceeds some limit)", {}, "24:00:00", "gpu 2-00:00:00"),
        ("Requested node configuration is not available", {"gpus_per_node": 8}, "8 GPUs a node", "to 4 or less"),
        ("Requested node configuration is not available", {"cpus_per_node": 96}, "96 CPUs a node", "64 or less"),
        ("Memory specification can not be satisfied", {"memory_mib": 900000}, "900,000 MiB", "500000M or less"),
        ("Invalid feature specification", {"constraint": "h100"}, "constraint is h100", "these: a100, ib."),
        ("Requested reservation is invalid", {"options": ("--reservation=x",)}, "--reservation=x", "options of here"),
        ("Job violates accounting/QOS policy (job submit limit)", {}, "beyond what you may have", "sacctmgr show qos"),
        ("Something new", {}, "refuses the job first", "--dry-run"),
    ],
)
def test_each_names_the_field_and_what_is_allowed(said: str, changes: dict[str, object], fact: str, fix: str) -> None:
    message = told(said, asked=replace(ASKED, **changes))
    head, why, mend = message.split("\n")
    assert fact in head
    assert said in why
    assert fix in mend


def test_a_partition_of_other_accounts_says_whose_it_is() -> None:
    site = SITE.model_copy(update={"account": "open"})
    said = "Invalid account or account/partition combination specified"
    assert "account is open, and partition gpu is for lab." in told(said, site)


def test_a_gpu_type_that_no_node_has() -> None:
    site = SITE.model_copy(update={"gpu_type": "h100"})
    assert "set gpu_type of here to one of a100." in told("Invalid generic resource (gres) specification", site)


def test_what_slurm_would_take_and_never_start_is_refused() -> None:
    assert refusals.too_much(SITE, ASKED) is None
    too_many = str(refusals.too_much(SITE, replace(ASKED, num_nodes=3)))
    assert "asks for 3 nodes, and partition gpu has 2." in too_many
    too_long = str(refusals.too_much(SITE, replace(ASKED, time="2-00:00:01")))
    assert "asks for 2-00:00:01, and partition gpu gives 48:00:00 at most" in too_long


def test_a_qos_may_lift_the_partitions_time() -> None:
    assert refusals.too_much(SITE, replace(ASKED, time="9-00:00:00", qos="long")) is None


def test_of_several_partitions_the_largest_counts() -> None:
    assert refusals.too_much(SITE, replace(ASKED, partition="gpu,cpu", num_nodes=9, time="9-00:00:00")) is None
    assert refusals.too_much(SITE, replace(ASKED, partition="gpu,old", time="40:00:00")) is None


def test_nodes_that_are_down_for_now_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    error = SlurmError("sbatch", "allocation failure: Requested node configuration is not available", "")
    assert refusals.nodes_are_down(error, ASKED) == ""
    drained = [{**node, "State": "IDLE+DRAIN"} if node["NodeName"] == "g2" else node for node in NODES]
    monkeypatch.setattr(refusals, "nodes", lambda: drained)
    assert refusals.nodes_are_down(error, ASKED) == "1 of the 2 nodes that fit it are down or drained"
    assert refusals.nodes_are_down(error, replace(ASKED, gpus_per_node=8)) == ""
    assert refusals.nodes_are_down(SlurmError("sbatch", "Invalid qos specification", ""), ASKED) == ""


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("gpu:2", [("", 2)]),
        ("gpu:a100:4(S:0-1)", [("a100", 4)]),
        ("gpu:h100:8(S:0-1),nvme:1", [("h100", 8)]),
        ("gpu:a30:2,gpu:a100:2", [("a30", 2), ("a100", 2)]),
        ("(null)", []),
    ],
)
def test_gpus_of_a_node(gres: str, found: list[tuple[str, int]]) -> None:
    assert refusals.gpus_of({"Gres": gres}) == found
