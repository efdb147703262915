"""Slurm's refusals as messages with the values that the site accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from packhorse.launching.slurm import refusals
from packhorse.launching.slurm.client import SlurmClient, SlurmError
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
REQUEST = train_request(SITE, "first", Path("/runs/first/logs"), 2, 4, "24:00:00", 180)


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlurmClient, "partitions", lambda _: PARTITIONS)
    monkeypatch.setattr(SlurmClient, "nodes", lambda _: NODES)
    monkeypatch.setattr(
        SlurmClient, "associations", lambda _: [("lab", "", ("normal", "long")), ("open", "", ("normal",))]
    )


def message_of(output: str, site: SiteProfile = SITE, request: JobRequest = REQUEST) -> str:
    return str(refusals.explain_refusal(SlurmError("sbatch", output, ""), site, request))


@pytest.mark.parametrize(
    ("output", "changes", "fact", "fix"),
    [
        ("Invalid partition name specified", {"partition": "gpuu"}, "partition is gpuu", "one of gpu, cpu."),
        ("Invalid account or account/partition combination specified", {}, "account is lab.", "one of lab, open."),
        ("Invalid qos specification", {"qos": "fast"}, "qos is fast", "one of long, normal."),
        ("Invalid --time specification", {}, "requests 24:00:00", "gpu 2-00:00:00"),
        ("Requested time limit is invalid (missing or exceeds some limit)", {}, "24:00:00", "gpu 2-00:00:00"),
        ("Requested node configuration is not available", {"gpus_per_node": 8}, "8 GPUs per node", "to 4 or less"),
        ("Requested node configuration is not available", {"cpus_per_node": 96}, "96 CPUs per node", "64 or less"),
        ("Memory specification can not be satisfied", {"memory_mib": 900000}, "900,000 MiB", "500000M or less"),
        (
            "Invalid feature specification",
            {"constraint": "h100"},
            "constraint is h100",
            "of the nodes: a100, ib.",
        ),
        ("Requested reservation is invalid", {"options": ("--reservation=x",)}, "--reservation=x", "options of here"),
        ("Job violates accounting/QOS policy (job submit limit)", {}, "exceeds what you may use", "sacctmgr show qos"),
        ("Something new", {}, "refuses the job first", "--dry-run"),
    ],
)
def test_each_message_names_the_field_and_its_values(
    output: str, changes: dict[str, object], fact: str, fix: str
) -> None:
    fact_line, why_line, fix_line = message_of(output, request=replace(REQUEST, **changes)).split("\n")
    assert fact in fact_line
    assert output in why_line
    assert fix in fix_line


def test_a_partition_of_other_accounts_names_them() -> None:
    site = SITE.model_copy(update={"account": "open"})
    output = "Invalid account or account/partition combination specified"
    assert "account is open, and partition gpu is for lab." in message_of(output, site)


def test_a_gpu_type_that_no_node_has() -> None:
    site = SITE.model_copy(update={"gpu_type": "h100"})
    assert "set gpu_type of here to one of a100." in message_of("Invalid generic resource (gres) specification", site)


def test_a_job_that_slurm_would_never_start_is_refused() -> None:
    assert refusals.find_excess(SITE, REQUEST) is None
    too_many = str(refusals.find_excess(SITE, replace(REQUEST, num_nodes=3)))
    assert "requests 3 nodes, and partition gpu has 2." in too_many
    too_long = str(refusals.find_excess(SITE, replace(REQUEST, time="2-00:00:01")))
    assert "requests 2-00:00:01, and partition gpu allows 48:00:00." in too_long


def test_a_qos_may_lift_the_partitions_time() -> None:
    assert refusals.find_excess(SITE, replace(REQUEST, time="9-00:00:00", qos="long")) is None


def test_of_several_partitions_the_largest_counts() -> None:
    assert refusals.find_excess(SITE, replace(REQUEST, partition="gpu,cpu", num_nodes=9, time="9-00:00:00")) is None
    assert refusals.find_excess(SITE, replace(REQUEST, partition="gpu,old", time="40:00:00")) is None


def test_nodes_that_are_down_for_now_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = SlurmError("sbatch", "allocation failure: Requested node configuration is not available", "")
    assert refusals.unavailable_nodes(error, REQUEST) == ""
    drained = [{**node, "State": "IDLE+DRAIN"} if node["NodeName"] == "g2" else node for node in NODES]
    monkeypatch.setattr(SlurmClient, "nodes", lambda _: drained)
    assert refusals.unavailable_nodes(error, REQUEST) == "1 of the 2 nodes that fit it are down or drained"
    assert refusals.unavailable_nodes(error, replace(REQUEST, gpus_per_node=8)) == ""
    assert refusals.unavailable_nodes(SlurmError("sbatch", "Invalid qos specification", ""), REQUEST) == ""


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
