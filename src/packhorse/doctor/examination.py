"""Puts the question to every node: here, in the job that we stand in, or in a short job of its own."""

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

from packhorse.doctor.facts import NodeFacts, Question
from packhorse.doctor.folder import open_place
from packhorse.doctor.node import from_lines
from packhorse.launching.slurm.client import NoSlurmError, SlurmError
from packhorse.launching.slurm.refusals import explained, too_much
from packhorse.launching.slurm.script import DIRECTIVE, JobRequest, directives, site_lines, train_request
from packhorse.launching.slurm.site import SiteProfile

MOST_SECONDS: Final = 58.0
"""Of an examination, once its nodes are there."""
JOB_TIME: Final = "00:03:00"
NODE_MODULE: Final = "packhorse.doctor.node"
OF_SBATCH_ONLY: Final = (
    "--signal",
    "--requeue",
    "--no-requeue",
    "--open-mode",
    "--output",
    "--mail-user",
    "--mail-type",
)
UNHEARD_LINES: Final = 3
Say = Callable[[str], None]


def examine_here(question: Question) -> tuple[list[NodeFacts], str]:
    """Asks this machine alone."""
    return _ask(question, [sys.executable, "-m", NODE_MODULE], os.environ, MOST_SECONDS)


def examine_in_job(question: Question) -> tuple[list[NodeFacts], str]:
    """Asks each node of the job that we stand in, by a step of one task a node.

    Raises:
        NoSlurmError: srun is not on PATH.
    """
    words = [_srun(), "--overlap", *_one_task_a_node(question)]
    return _ask(question, [*words, sys.executable, "-m", NODE_MODULE], os.environ, MOST_SECONDS)


def examine_in_short_job(
    question: Question, site: SiteProfile, programs: str | None, say: Say
) -> tuple[list[NodeFacts], str]:
    """Asks nodes that a job of its own is given for so long; waits until it is given them.

    Raises:
        NoSlurmError: srun is not on PATH.
        UserError: Slurm refuses the job.
    """
    program, request = _srun(), _request(question, site)
    refused = too_much(site, request)
    if refused is not None:
        raise refused
    try:
        words = [program, *short_job_words(question, site, programs)]
        return _ask(question, words, _outside_of_jobs(), None, say)
    except SlurmError as error:
        raise explained(error, site, request) from error


def short_job_words(question: Question, site: SiteProfile, programs: str | None) -> list[str]:
    """The words after `srun`, without the question itself; what the site needs runs before it on each node."""
    lines = directives(site, _request(question, site))
    asked = [line.removeprefix(DIRECTIVE).split(" #")[0].strip() for line in lines]
    options = [word for word in asked if word.partition("=")[0] not in OF_SBATCH_ONLY]
    prologue = "\n".join([*site_lines(site, programs, trains=False), 'exec "${container[@]}" "$@"'])
    return [*options, *_one_task_a_node(question)[2:], "bash", "-c", prologue, "-", "python", "-m", NODE_MODULE]


def _request(question: Question, site: SiteProfile) -> JobRequest:
    """As a job that trains would ask, but for its time."""
    place, sizes = Path("/dev/null"), (question.num_nodes, question.gpus_per_node)
    return train_request(site, "packhorse-doctor", place, *sizes, time=JOB_TIME, signal_seconds=60)


def _one_task_a_node(question: Question) -> list[str]:
    count = str(question.num_nodes)
    return [f"--nodes={count}", "--ntasks-per-node=1", f"--ntasks={count}", "--label", "--kill-on-bad-exit=0"]


def _ask(
    question: Question,
    words: Sequence[str],
    environment: Mapping[str, str],
    seconds: float | None,
    say: Say | None = None,
) -> tuple[list[NodeFacts], str]:
    """Facts of the nodes that answered, and what was said on standard error."""
    place = None
    with suppress(OSError):  # a folder that cannot be written is what the nodes will say
        place = open_place(question)
    try:
        out, err, code = _run([*words, question.model_dump_json()], environment, seconds, say)
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    found = from_lines(out.splitlines())
    refusal = re.search(r"Unable to allocate resources: (.*)", err)
    if not found and code and refusal:
        raise SlurmError("srun", refusal[1], "see `man srun`.")
    return found, last_words(err)


def _run(
    words: Sequence[str], environment: Mapping[str, str], seconds: float | None, say: Say | None
) -> tuple[str, str, int]:
    """Both outputs, and the exit code; ends all that it started."""
    child = subprocess.Popen(  # noqa: S603
        words,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    heard: list[str] = []
    listener = threading.Thread(target=_listen, args=(child, heard, say), daemon=True)
    listener.start()
    ender = threading.Timer(seconds, lambda: _end(child)) if seconds is not None else None
    if ender is not None:
        ender.start()
    with child:
        try:
            assert child.stdout is not None
            out = child.stdout.read()
            code = child.wait()
            listener.join(1.0)
        finally:
            if ender is not None:
                ender.cancel()
            _end(child)
    return out, "".join(heard), code


def _listen(child: subprocess.Popen[str], heard: list[str], say: Say | None) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        heard.append(line)
        if say is not None and re.match(r"srun: (job|Job) \d+ (queued|has been)", line):
            say(line.strip().removeprefix("srun: "))


def _end(child: subprocess.Popen[str]) -> None:
    """srun takes a SIGTERM as an order to end its job, or step."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=3.0)


def last_words(err: str) -> str:
    """The last lines that say something, without the number that srun puts before each."""
    lines = [re.sub(r"^\s*\d+: ", "", line).strip() for line in err.splitlines()]
    telling = list(dict.fromkeys(line for line in lines if line and not re.match(r"srun: (job|Job) \d+", line)))
    return " | ".join(telling[-UNHEARD_LINES:])[:400]


def _srun() -> str:
    program = shutil.which("srun")
    if program is None:
        raise NoSlurmError("srun")
    return program


def _outside_of_jobs() -> dict[str, str]:
    """Our environment without that of a job, whose sizes would become those of a new one."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
