from __future__ import annotations

import base64
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_cases import REQUEST, sound_nodes

from packhorse.cli.main import main
from packhorse.doctor.__main__ import main as in_job
from packhorse.doctor.diagnosis import diagnose
from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.node import first_host, from_lines, to_lines, wait_for_ranks
from packhorse.doctor.rendezvous import open_port
from packhorse.doctor.run_checks import short_job_arguments
from packhorse.doctor.table import first_broken
from packhorse.launching.slurm.site import SiteProfile
from tiny import write_tiny


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[07-09]", "r1n07"),
        ("", ""),
    ],
)
def test_first_host_of_an_allocation(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_answers_are_decoded_among_labels_and_other_lines() -> None:
    lines = [f"{number}: {line}" for number, node in enumerate(sound_nodes()) for line in to_lines(node)]
    assert all(len(line) < 1000 for line in lines)
    mixed = [*lines, "0: bash: warning: setlocale: cannot change locale", "srun: error: something"]
    random.Random(0).shuffle(mixed)
    assert from_lines(mixed) == sound_nodes()
    # A node with a missing line has not answered.
    assert [node.node_id for node in from_lines(mixed[:-1] if lines[-1] == mixed[-1] else lines[:-1])] == [0]


def test_a_node_with_another_version_of_packhorse_answers() -> None:
    facts = json.loads(base64.b64decode("".join(line.split()[-1] for line in to_lines(sound_nodes()[1]))))
    text = json.dumps(facts | {"versions": facts["versions"] | {"packhorse": "9.0"}, "of_tomorrow": 1})
    other = f"packhorse-doctor 1 0 1 {base64.b64encode(text.encode()).decode()}"
    rows = diagnose(REQUEST, from_lines([*to_lines(sound_nodes()[0]), other]))
    assert first_broken(rows).fact == "packhorse is 0.1.0 on gpu1, 9.0 on gpu2"


def check_two_nodes(request: DoctorRequest, environment: dict[str, str] | None = None) -> list[str]:
    """Run both nodes on this machine, as srun starts them."""
    command = [sys.executable, "-m", "packhorse.doctor.node", request.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (environment or {})
    nodes = [
        subprocess.Popen(command, env=environment | {"SLURM_NODEID": str(number)}, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    return [line for node in nodes for line in node.communicate(timeout=180)[0].splitlines()]


@pytest.fixture
def request_of_two(tmp_path: Path) -> DoctorRequest:
    with open_port(0) as probe:
        port = probe.getsockname()[1]
    (tmp_path / ".packhorse-doctor-ab").mkdir()
    (tmp_path / ".packhorse-doctor-ab/start").write_text("ab")
    return DoctorRequest(
        num_nodes=2,
        gpus_per_node=0,
        folder=str(tmp_path),
        token="ab",
        fast=True,
        master_addr="127.0.0.1",
        master_port=port,
    )


def test_two_nodes_meet_and_are_diagnosed(request_of_two: DoctorRequest) -> None:
    found = from_lines(check_two_nodes(request_of_two, {"GLOO_SOCKET_IFNAME": "lo"}))
    rows = diagnose(request_of_two, found)
    assert first_broken(rows) is None, rows
    assert {row.name: row.status for row in rows}["between nodes"] == "ok"
    assert max(node.seconds for node in found) < 5


def test_ranks_that_are_slow_are_ended_and_have_not_failed() -> None:
    def rank(program: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["sh", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    slow = rank("exec sleep 60")
    found = wait_for_ranks([slow, rank("echo '{\"world_size\": 2}'")], 0.3)
    assert (found.timed_out, found.error, slow.returncode) == (True, "", -9)
    found = wait_for_ranks([rank("echo no route >&2; exit 3")], 10)
    assert (found.timed_out, found.error) == (False, "exit code 3: no route")


def test_an_interface_that_is_not_there(request_of_two: DoctorRequest) -> None:
    rows = diagnose(request_of_two, from_lines(check_two_nodes(request_of_two, {"GLOO_SOCKET_IFNAME": "ib9"})))
    broken = first_broken(rows)
    assert broken is not None
    assert broken.name == "interface"
    assert "GLOO_SOCKET_IFNAME is ib9" in broken.fact


def test_the_short_job_requests_what_the_site_defines() -> None:
    site = SiteProfile.model_validate(
        {
            "name": "there",
            "account": "proj",
            "partition": "gpu",
            "gpus_asked_by": "gres",
            "gpu_type": "h100",
            "modules": ["cuda/12.8"],
            "network_interface": "ib0",
            "environment": {"HF_HOME": "/shared/a folder; touch canary"},
            "options": ["--exclusive"],
        }
    )
    words = short_job_arguments(REQUEST, site, "/shared/venv/bin")
    assert words[: words.index("bash")] == [
        "--job-name=packhorse-doctor", "--account=proj", "--partition=gpu", "--nodes=2", "--ntasks-per-node=1",
        "--gres=gpu:h100:2", "--time=00:05:00", "--exclusive", "--ntasks=2", "--label", "--kill-on-bad-exit=0",
    ]  # fmt: skip
    before = words[words.index("-c") + 1]
    assert "module load cuda/12.8 || exit 2" in before
    assert "export NCCL_SOCKET_IFNAME==ib0 GLOO_SOCKET_IFNAME=ib0" in before
    assert "export HF_HOME='/shared/a folder; touch canary'" in before
    assert words[-4:] == ["-", "python", "-m", "packhorse.doctor.node"]


def test_dry_run_shows_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("site.yaml").write_text("name: there\ngpus_per_node: 4\n")
    assert main(["doctor", "--site", "site.yaml", "--nodes", "3", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "srun"
    assert {"--nodes=3", "--gpus-per-node=4"} <= set(words)
    request = json.loads(words[-1])
    assert (request["num_nodes"], request["gpus_per_node"], request["folder"]) == (3, 4, str(tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "site.yaml"]


def test_without_slurm_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("site.yaml").write_text("name: there\n")
    assert main(["doctor", "--site", "site.yaml"]) == 2
    assert "there is no Slurm here: no srun on PATH" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    assert main(["plan", "tiny.yaml", "--write"]) == 0
    return tmp_path / "runs/tiny"


def test_doctor_of_a_run_here(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["doctor", "runs/tiny", "--fast"]) == 0
    assert "first broken" not in capsys.readouterr().out
    plan = json.loads((run / "plan.json").read_text())
    next(Path(plan["data"]["folder"]).rglob("*.bin")).unlink()
    assert main(["doctor", "runs/tiny", "--fast"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "first broken: data: on" in out
    assert "fix: prepare it in a folder that all nodes see" in out
    assert not [path for path in run.iterdir() if path.name.startswith(".packhorse-doctor")]


def test_a_run_has_its_nodes_in_its_plan(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "runs/tiny", "--nodes", "2", "--site", "slurm/sites/none.yaml"]) == 2
    Path("site.yaml").write_text("name: there\n")
    assert main(["doctor", "runs/tiny", "--nodes", "2"]) == 2
    error = capsys.readouterr().err
    assert "runs/tiny is planned for 1 nodes x 0 GPUs; --nodes and --gpus-per-node request 2 x 0" in error


def test_the_two_halves_of_a_job_script(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert in_job(["request", "runs/tiny"]) == 0
    text = capsys.readouterr().out.strip()
    command = [sys.executable, "-m", "packhorse.doctor.node", text]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, timeout=180
    )
    for lines, code, words in (
        (done.stdout.decode(), 0, "doctor: "),
        ("0: bash: line 1: python: command not found\n", 1, "python: command not found"),
    ):
        (run / "output").write_text(lines)
        with (run / "output").open() as output:
            monkeypatch.setattr("sys.stdin", output)
            assert in_job(["diagnose", text]) == code
        assert words in " ".join(capsys.readouterr().err.split())
    assert not [path for path in run.iterdir() if path.name.startswith(".packhorse-doctor")]
