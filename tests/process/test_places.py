"""Launches that no scheduler of ours makes: the lines of `packhorse plan --argv`, and what a pod runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from packhorse.cli.main import main
from packhorse.errors import EXIT_STOPPED
from packhorse.run_folder.status import read_status
from tiny import write_tiny


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    programs = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_OFFLINE": "1",
    }


def test_a_torchrun_line_on_each_of_two_nodes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, steps=2, parallel={"engine": "fsdp2", "processes": 2})
    assert main(["plan", "tiny.yaml", "--nodes", "2", "--write"]) == 0
    capsys.readouterr()
    assert main(["plan", "tiny.yaml", "name=tiny", "--nodes", "2", "--argv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.startswith("export ")]
    first = re.sub(r"NODE_0.*", f"127.0.0.1 MASTER_PORT={free_port()}", first)
    typed = [line for line in lines if " torchrun " in line and not line.startswith("#")]
    assert len(typed) == 2
    nodes = [subprocess.Popen(["bash", "-c", f"{first}; {line}"], env=environment()) for line in typed]
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    # The worker itself has looked: as many ranks as planned, and sharded as planned.
    now = read_status(tmp_path / "runs/tiny")
    assert (now.state, now.step) == ("finished", 2)


def test_a_pod_that_is_ended_saves_and_the_next_one_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, steps=400)
    assert main(["plan", "tiny.yaml", "--write"]) == 0
    run = tmp_path / "runs/tiny"
    # As an operator sets them for a pod.
    pod = environment() | {"RANK": "0", "WORLD_SIZE": "1", "PET_NNODES": "1"}
    words = [sys.executable, "-m", "packhorse.launching.places.start", "runs/tiny", "0", "127.0.0.1", str(free_port())]
    with subprocess.Popen(words, env=pod) as first:
        metrics = run / "metrics.jsonl"
        end = time.monotonic() + 200
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < end:
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=300) == EXIT_STOPPED
    stopped = read_status(run)
    assert stopped.state == "stopped"
    assert 1 <= stopped.step < 400
    assert not (run / "STOP").exists()
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["steps"] = plan["num_steps"] = stopped.step + 1
    (run / "plan.json").write_text(json.dumps(plan))
    assert subprocess.run(words, env=pod | {"PACKHORSE_ATTEMPT": "2"}, timeout=600).returncode == 0
    finished = read_status(run)
    assert (finished.state, finished.step) == ("finished", stopped.step + 1)
