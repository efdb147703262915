"""A real Slurm of several nodes on this machine, by the tool in shared/: up in seconds, down without trace."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import shared_folder

CHECKOUT = Path(__file__).resolve().parents[2]
JOB_SCRIPT = CHECKOUT / "slurm" / "job.sbatch"
# A node's memory is only claimed: what ranks share is counted for each of them, and Slurm ends those that take more.
USUAL = {"SLURM_TEST_NODES": "2", "SLURM_TEST_MEM": "64000", "SLURM_TEST_CONF": "MessageTimeout=30"}
MEMORY = "--mem=16000"
STARTED = itertools.count()
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


class Cluster:
    """A controller and its nodes.

    Attributes:
        environment: In which Slurm's programs speak to this cluster, and jobs find this checkout.
        nodes: Their names.
    """

    def __init__(self, tool: Path, settings: Mapping[str, str]) -> None:
        self._tool, self._settings = tool, {**os.environ, **settings}
        self._run("up")
        folder = Path(settings["SLURM_TEST_DIR"])
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {
            **ours,
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "PATH": path,
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT / "src"), str(CHECKOUT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "NO_COLOR": "1",
            "COLUMNS": "120",
        }
        self.nodes = self.ask("sinfo", "-h", "-N", "-p", "debug", "-o", "%N").split()

    def ask(self, program: str, *words: str) -> str:
        """Runs one of Slurm's programs; what it prints."""
        done = subprocess.run(
            [program, *words],
            env=self.environment,
            executable=shutil.which(program, path=self.environment["PATH"]),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, run: Path, *options: str, script: Path = JOB_SCRIPT, **variables: str) -> str:
        """`sbatch OPTIONS slurm/job.sbatch RUN`, with as little as these nodes need; the job's number.

        Its output goes to RUN/job-NUMBER.out.
        """
        usual = [
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            MEMORY,
            "--time=30",
            "--signal=B:USR1@120",
            f"--output={run}/job-%j.out",
        ]
        words = ["--parsable", *usual, *options, str(script), str(run)]
        done = subprocess.run(
            ["sbatch", *words],
            env=self.environment | variables,
            executable=shutil.which("sbatch", path=self.environment["PATH"]),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", text))

    def wait(self, number: str, seconds: float = 400) -> str:
        """Waits until a job has ended; its state."""
        self.wait_until(lambda: self.job(number)["JobState"] not in LIVE, seconds, lambda: self.told(number))
        return self.job(number)["JobState"]

    def told(self, number: str) -> str:
        """What a job has written, and what Slurm knows of it."""
        job = self.job(number)
        out = Path(job.get("StdOut", "/nonexistent"))
        said = out.read_text(encoding="utf-8", errors="replace")[-6000:] if out.is_file() else "nothing"
        return f"job {number} is {job['JobState']} ({job.get('Reason')}); it says:\n{said}"

    @staticmethod
    def wait_until(condition: Callable[[], object], seconds: float, told: Callable[[], str]) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:.0f} s; {told()}"
            time.sleep(0.1)

    def kill_node(self, name: str) -> None:
        """The power of a node fails."""
        self._run("kill-node", name)

    def start_node(self, name: str) -> None:
        """It boots again."""
        self._run("start-node", name)

    def down(self) -> None:
        """Ends all that was started, jobs too."""
        self._run("down")

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            [str(self._tool), *words], env=self._settings, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"slurm-cluster {' '.join(words)}: {done.stderr}"
        return done.stdout


@contextmanager
def running_cluster(**settings: str) -> Iterator[Cluster]:
    """A cluster with these settings of the tool, such as `SLURM_TEST_NODES="4"`; skips in a user's clone."""
    tool = shared_folder.shared("tools/slurm-cluster")
    # Short: a socket lies in it. Not below pytest's folder, which only its user may enter.
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    Path(folder).chmod(0o755)
    chosen = {"SLURM_TEST_DIR": folder, "SLURM_TEST_NET": network(), "SLURM_TEST_PORT": str(free_ports()), **USUAL}
    cluster = Cluster(tool, {**chosen, **settings})
    try:
        yield cluster
    finally:
        cluster.down()


def network() -> str:
    """A network of its own for each node, where this machine gives one: there `localhost` is no rendezvous."""
    if os.geteuid() != 0:
        return "plain"
    tried = ["unshare", "--net", "ip", "link", "add", "type", "bridge"]
    return "loopback" if subprocess.run(tried, capture_output=True).returncode else "netns"


def free_ports() -> int:
    """The first of ports that another cluster on this machine is not likely to take; below those the kernel gives."""
    return 17400 + 10 * ((8 * os.getpid() + next(STARTED)) % 250)
