"""Run the checks on every node: on this machine, in the surrounding job, or in a separate short job."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from packhorse.doctor.facts import DoctorRequest, NodeFacts
from packhorse.doctor.node import BANDWIDTH_SECONDS, from_lines
from packhorse.doctor.shared_folder import create_check_folder
from packhorse.launching.slurm.client import NoSlurmError, SlurmError, environment_outside_jobs
from packhorse.launching.slurm.refusals import explain_refusal, find_excess
from packhorse.launching.slurm.script import DIRECTIVE, JobRequest, directives, site_lines, train_request
from packhorse.launching.slurm.site import SiteProfile

FAST_SECONDS: Final = 58.0
"""Limit of the checks without the bandwidth, from the time when the nodes are available."""
JOB_TIME: Final = "00:05:00"
NODE_MODULE: Final = "packhorse.doctor.node"
SBATCH_ONLY: Final = {"--signal", "--requeue", "--no-requeue", "--open-mode", "--output", "--mail-user", "--mail-type"}
MAX_LAST_LINES: Final = 3
PrintLine = Callable[[str], None]


def check_this_machine(request: DoctorRequest) -> tuple[list[NodeFacts], str]:
    """Run the checks on this machine alone."""
    return _collect(request, [sys.executable, "-m", NODE_MODULE], os.environ, _max_seconds(request))


def check_nodes_of_job(request: DoctorRequest) -> tuple[list[NodeFacts], str]:
    """Run the checks on each node of the surrounding job, in a step with one task per node.

    Raises:
        NoSlurmError: srun is not on PATH.
    """
    command = [_srun(), "--overlap", *_one_task_per_node(request), sys.executable, "-m", NODE_MODULE]
    return _collect(request, command, os.environ, _max_seconds(request))


def check_nodes_in_short_job(
    request: DoctorRequest, site: SiteProfile, programs: str | None, print_line: PrintLine
) -> tuple[list[NodeFacts], str]:
    """Run the checks in a separate short job, and wait until it starts and ends.

    Raises:
        NoSlurmError: srun is not on PATH.
        UserError: Slurm refuses the job.
    """
    program, job = _srun(), _job_request(request, site)
    excess = find_excess(site, job)
    if excess is not None:
        raise excess
    try:
        command = [program, *short_job_arguments(request, site, programs)]
        return _collect(request, command, environment_outside_jobs(), None, print_line)
    except SlurmError as error:
        raise explain_refusal(error, site, job) from error


def short_job_arguments(request: DoctorRequest, site: SiteProfile, programs: str | None) -> list[str]:
    """Return the arguments of `srun` without the request itself; the lines of the site run first on each node."""
    lines = directives(site, _job_request(request, site))
    words = [line.removeprefix(DIRECTIVE).split(" #")[0].strip() for line in lines]
    options = [word for word in words if word.partition("=")[0] not in SBATCH_ONLY]
    prologue = "\n".join([*site_lines(site, programs, trains=False), 'exec "${container[@]}" "$@"'])
    return [*options, *_one_task_per_node(request)[2:], "bash", "-c", prologue, "-", "python", "-m", NODE_MODULE]


def _max_seconds(request: DoctorRequest) -> float:
    return FAST_SECONDS if request.fast else FAST_SECONDS + BANDWIDTH_SECONDS


def _job_request(request: DoctorRequest, site: SiteProfile) -> JobRequest:
    """Return the request of a training job, with a short time limit."""
    sizes = (request.num_nodes, request.gpus_per_node)
    return train_request(site, "packhorse-doctor", Path("/dev/null"), *sizes, time=JOB_TIME, signal_seconds=60)


def _one_task_per_node(request: DoctorRequest) -> list[str]:
    count = str(request.num_nodes)
    return [f"--nodes={count}", "--ntasks-per-node=1", f"--ntasks={count}", "--label", "--kill-on-bad-exit=0"]


def _collect(
    request: DoctorRequest,
    command: Sequence[str],
    environment: Mapping[str, str],
    seconds: float | None,
    print_line: PrintLine | None = None,
) -> tuple[list[NodeFacts], str]:
    """Return the facts of the nodes that answered, and the last lines of standard error."""
    folder = None
    with suppress(OSError):  # the nodes report that they cannot write there
        folder = create_check_folder(request)
    try:
        out, err, code = _run([*command, request.model_dump_json()], environment, seconds, print_line)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    nodes = from_lines(out.splitlines())
    refusal = re.search(r"Unable to allocate resources: (.*)", err)
    if not nodes and code and refusal:
        raise SlurmError("srun", refusal[1], "see `man srun`.")
    return nodes, last_lines(err)


def _run(
    command: Sequence[str], environment: Mapping[str, str], seconds: float | None, print_line: PrintLine | None
) -> tuple[str, str, int]:
    """Run a command in its own process group; return both outputs and the exit code, and end all its processes."""
    child = subprocess.Popen(  # noqa: S603
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    errors: list[str] = []
    reader = threading.Thread(target=_read_errors, args=(child, errors, print_line), daemon=True)
    reader.start()
    timer = threading.Timer(seconds, lambda: _end(child)) if seconds is not None else None
    if timer is not None:
        timer.start()
    with child:
        try:
            assert child.stdout is not None
            out = child.stdout.read()
            code = child.wait()
            reader.join(1.0)
        finally:
            if timer is not None:
                timer.cancel()
            _end(child)
    return out, "".join(errors), code


def _read_errors(child: subprocess.Popen[str], errors: list[str], print_line: PrintLine | None) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        errors.append(line)
        if print_line is not None and re.match(r"srun: (job|Job) \d+ (queued|has been)", line):
            print_line(line.strip().removeprefix("srun: "))


def _end(child: subprocess.Popen[str]) -> None:
    """End the process group; srun ends its job or step on SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=3.0)


def last_lines(output: str) -> str:
    """Return the last different lines that are not empty, without the label of srun before each."""
    lines = [re.sub(r"^\s*\d+: ", "", line).strip() for line in output.splitlines()]
    different = list(dict.fromkeys(line for line in lines if line and not re.match(r"srun: (job|Job) \d+", line)))
    return " | ".join(different[-MAX_LAST_LINES:])[:400]


def _srun() -> str:
    program = shutil.which("srun")
    if program is None:
        raise NoSlurmError("srun")
    return program
