"""Faults of a cluster, made on a real one: the doctor names each, and the row to mend first, within a minute."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, network, running_cluster

from cli import PACKHORSE, Typed, packhorse
from missing_parts import missing
from tiny import write_tiny

MOST_SECONDS = 60
NODES_HAVE_GPUS = """#!/bin/sh
echo "0, GPU-aaaa, Made up, 81559, 4"
[ "$(hostname)" = node2 ] || echo "1, GPU-bbbb, Made up, 81559, 4"
"""


@dataclass(frozen=True)
class Place:
    """A cluster of two nodes, each with a network of its own.

    Attributes:
        shared: Folder that all nodes see.
        private: Folder of which each node has its own.
    """

    cluster: Cluster
    shared: Path
    private: Path

    def on_node(self, name: str, *words: str) -> None:
        """Runs a command as root of a node would; its files and its network."""
        run = Path(self.cluster.environment["SLURM_CONF"]).parents[1] / "run" / f"{name}.pid"
        process = run.read_text().split()[0]
        subprocess.run(["nsenter", "--target", process, "--net", "--mount", *words], check=True, capture_output=True)

    def doctor(self, *words: str, folder: Path | None = None, site: Sequence[str] = (), **variables: str) -> Typed:
        """Types `packhorse doctor` for both nodes; it must end within a minute."""
        folder = folder or self.shared
        lines = ["name: there", "gpus_per_node: 0", "memory_per_node: 16G", *site]
        profile = self.shared / "site.yaml"
        profile.write_text("\n".join(lines) + "\n")
        began = time.monotonic()
        done = subprocess.run(
            [str(PACKHORSE), "doctor", "--site", str(profile), "--nodes", "2", *words],
            cwd=folder,
            env=self.cluster.environment | variables,
            capture_output=True,
            text=True,
            timeout=2 * MOST_SECONDS,
        )
        assert time.monotonic() - began < MOST_SECONDS
        return Typed(done.returncode, " ".join(done.stdout.split()), done.stderr)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if network() != "netns":
        missing("this machine gives nodes no network of their own, so none of it can be broken")
    folder = Path(tempfile.mkdtemp(prefix="doctor-", dir="/tmp"))
    (folder / "private").mkdir()
    (folder / "shared").mkdir()
    with running_cluster(SLURM_TEST_NODE_LOCAL=str(folder / "private")) as cluster:
        yield Place(cluster, folder / "shared", folder / "private")
    shutil.rmtree(folder)


@contextmanager
def on_nodes(place: Place, nodes: Sequence[str], make: str, undo: str) -> Iterator[None]:
    """A fault of some nodes, for a while."""
    for node in nodes:
        place.on_node(node, "sh", "-ec", make)
    try:
        yield
    finally:
        for node in nodes:
            place.on_node(node, "sh", "-ec", undo)


def test_two_sound_nodes(place: Place) -> None:
    told = place.doctor()
    assert told.code == 0, told
    assert "first broken" not in told.out
    for said in (
        "nodes ok 2 nodes answered: node1, node2",
        "interface ok gloo uses eth0",
        "between nodes ok every node reaches every other (2 connections)",
        "every node sees the files of all others",
        "reads while the file was replaced: always complete",
        "gloo, 2 ranks:",
        "launcher 0 on node1; 1 on node2",
    ):
        assert said in told.out
    assert not list(place.shared.glob(".packhorse-doctor*"))


def test_an_interface_that_is_not_there(place: Place) -> None:
    told = place.doctor("--fast", site=["network_interface: eth7"])
    assert told.code == 1
    assert "first broken: interface: node1: GLOO_SOCKET_IFNAME is eth7" in told.out
    assert "node1 has eth0" in told.out


def test_an_interface_that_leads_nowhere(place: Place) -> None:
    make = "ip link add bad0 type veth peer name bad1; ip addr add 172.31.7.1/24 dev bad0; ip link set bad0 up"
    with on_nodes(place, ["node1", "node2"], make, "ip link del bad0"):
        told = place.doctor("--fast", site=["network_interface: bad0"])
    assert told.code == 1
    assert "first broken: between nodes: node1 cannot reach node2 at 172.31.7.1 (bad0, used by gloo)" in told.out


def test_a_port_that_is_blocked(place: Place) -> None:
    rule = "ip rule {} priority 7 ipproto tcp sport 20000-32767 blackhole"
    with on_nodes(place, ["node1"], rule.format("add"), rule.format("del")):
        told = place.doctor("--fast")
    assert told.code == 1
    assert "first broken: port: node2 cannot reach port" in told.out
    assert "of node1 (10.231.77.1): no answer" in told.out


def test_a_version_that_differs(place: Place) -> None:
    metadata = place.private / "transformers-4.0.0.dist-info"
    said = "Metadata-Version: 2.1\\nName: transformers\\nVersion: 4.0.0\\n"
    make = f"mkdir {metadata}; printf '{said}' > {metadata}/METADATA"
    path = f"{place.private}{os.pathsep}{place.cluster.environment['PYTHONPATH']}"
    with on_nodes(place, ["node2"], make, f"rm -r {metadata}"):
        told = place.doctor("--fast", PYTHONPATH=path)
    assert told.code == 1
    assert "first broken: versions: transformers is " in told.out
    assert "on node1, 4.0.0 on node2" in told.out


def test_a_folder_that_is_not_shared(place: Place) -> None:
    told = place.doctor("--fast", folder=place.private)
    assert told.code == 1
    assert "first broken: shared folder: node1 does not see in" in told.out
    assert "(the file system there is tmpfs)" in told.out


def test_a_disk_that_is_full(place: Place) -> None:
    disk = place.shared / "disk"
    disk.mkdir()
    with on_nodes(place, ["node2"], f"mount -t tmpfs -o size=64k tmpfs {disk}", f"umount {disk}"):
        told = place.doctor("--fast", folder=disk)
    disk.rmdir()
    assert told.code == 1
    assert "first broken: disk: node2 cannot write to" in told.out
    assert "No space left on device" in told.out


def test_a_node_with_a_gpu_less(place: Place) -> None:
    programs = place.shared / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(NODES_HAVE_GPUS)
    (programs / "nvidia-smi").chmod(0o755)
    path = f"{programs}{os.pathsep}{place.cluster.environment['PATH']}"
    told = place.doctor("--fast", "--gpus-per-node", "2", PATH=path, CUDA_VISIBLE_DEVICES="0,1")
    shutil.rmtree(programs)
    assert told.code == 1
    assert "first broken: GPUs: node2 has 1 of 2 GPUs" in told.out


@pytest.mark.parametrize(
    ("site", "words", "fact"),
    [
        ("partition: nowhere", [], "set partition of there to one of debug, low, high, team"),
        ("partition: debug", ["--nodes", "3"], "the job requests 3 nodes, and partition debug has 2"),
    ],
)
def test_slurm_refuses_the_nodes(site: str, words: list[str], fact: str, place: Place) -> None:
    told = place.doctor("--fast", *words, site=[site])
    assert told.code == 2
    assert fact in told.err
    assert "fix: " in told.err


def test_inside_a_job_it_asks_all_nodes_of_it(place: Place) -> None:
    words = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--mem=8G", f"--chdir={place.shared}"]
    job = place.cluster.ask("sbatch", *words, f"--output={place.shared}/said", "--wrap=packhorse doctor --fast").strip()
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.told(job)
    told = " ".join((place.shared / "said").read_text().split())
    assert "nodes ok 2 nodes answered: node1, node2" in told
    assert "launcher 0 on node1; 1 on node2" in told


def test_a_job_stops_before_it_loads_weights(place: Place) -> None:
    write_tiny(place.shared, steps=2)
    done = packhorse(place.shared, "plan", "tiny.yaml", "parallel.processes=2", "--nodes", "2", "--write")
    assert done.code == 0, done.err
    run = place.shared / "runs" / "tiny"
    job = place.cluster.submit(run, "--nodes=2", GLOO_SOCKET_IFNAME="eth7")
    assert place.cluster.wait(job) == "FAILED"
    told = " ".join((run / f"job-{job}.out").read_text().split())
    assert "first broken: interface: node1: GLOO_SOCKET_IFNAME is eth7" in told
    assert not list((run / "logs").glob("attempt-*/rank-*"))
