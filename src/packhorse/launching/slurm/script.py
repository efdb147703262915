"""The job scripts: the shipped ones, with their `#SBATCH` block and the lines of the site filled in.

Everything else stands as it was reviewed. No value can end the block or be run: `#SBATCH` values have strict patterns
(a space makes Slurm ignore every later line), and what bash reads is quoted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.launching.slurm.site import SiteProfile, mebibytes_of
from packhorse.recipe.shipped import shipped_path
from packhorse.run_folder.layout import job_log_name
from packhorse.yaml_source.environment import ENVIRONMENT_REFERENCE

TRAIN_SCRIPT: Final = "job.sbatch"
COMMAND_SCRIPT: Final = "command.sbatch"
SITE_BEGINS: Final = "# --- site ---"
SITE_ENDS: Final = "# --- end of site ---"
DIRECTIVE: Final = "#SBATCH "
SAFE_PATH = re.compile(r"/[A-Za-z0-9._@+,=:/-]*")
SAFE_LOG = re.compile(r"[a-z-]+-(%j|%A_%a)\.out")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NOTES: Final = {
    "--ntasks-per-node": "one launcher a node; it starts one rank a GPU",
    "--signal": "to this script, so many seconds before the time limit",
    "--open-mode": "or the log is cut at every restart",
}
NOTE_COLUMN: Final = 37


@dataclass(frozen=True)
class JobRequest:
    """What one job asks Slurm for.

    Attributes:
        name: Its name in Slurm.
        output: Absolute path of its log; `%j` stands for its number.
        time: Its limit, such as `24:00:00`.
        num_nodes: Nodes, one task each.
        gpus_per_node: GPUs of each.
        cpus_per_node: CPUs of each; None takes the site's default.
        memory_mib: Memory of each in MiB; None takes the partition's.
        partition: Partition; None takes the site's default.
        qos: Quality of service.
        signal_seconds: How long before its end the script is told; None where it need not be.
        constraint: Features that its nodes must have.
        options: Further options of sbatch.
    """

    name: str
    output: str
    time: str
    num_nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    memory_mib: int | None = None
    partition: str | None = None
    qos: str | None = None
    signal_seconds: int | None = None
    constraint: str | None = None
    options: tuple[str, ...] = ()


def train_request(
    site: SiteProfile, name: str, logs: Path, num_nodes: int, gpus_per_node: int, time: str, signal_seconds: int
) -> JobRequest:
    """A job that trains, with what the site gives to so many GPUs of a node."""
    asked = gpu_request(site, name, logs, "job", gpus_per_node)
    return replace(asked, name=name, time=time, num_nodes=num_nodes, signal_seconds=signal_seconds)


def gpu_request(site: SiteProfile, name: str, logs: Path, kind: str, gpus: int) -> JobRequest:
    """A job of one command on so many GPUs of one node; on a site without GPUs, on a node's CPUs."""
    cpus = site.cpus_per_gpu * gpus if site.cpus_per_gpu and gpus else site.cpus_per_node
    memory = mebibytes_of(site.memory_per_node) if site.memory_per_node else None
    if site.memory_per_gpu and gpus:
        memory = mebibytes_of(site.memory_per_gpu) * gpus
    return JobRequest(
        name=f"{name}-{kind}",
        output=str(logs / job_log_name(kind)),
        time=site.time,
        gpus_per_node=gpus,
        cpus_per_node=cpus,
        memory_mib=memory,
        partition=site.partition,
        qos=site.qos,
        constraint=site.constraint,
        options=tuple(site.options),
    )


def cpu_request(site: SiteProfile, name: str, logs: Path, kind: str) -> JobRequest:
    """A job of one command that needs no GPU."""
    jobs = site.cpu_jobs
    return JobRequest(
        name=f"{name}-{kind}",
        output=str(logs / job_log_name(kind)),
        time=jobs.time,
        cpus_per_node=jobs.cpus,
        memory_mib=mebibytes_of(jobs.memory) if jobs.memory else None,
        partition=jobs.partition or site.partition,
        qos=jobs.qos or site.qos,
    )


def train_script(site: SiteProfile, request: JobRequest, programs: str | None) -> str:
    """The job script of a run; its argument is the run folder.

    Args:
        site: Where it runs.
        request: What it asks for.
        programs: Folder of python and accelerate on the nodes; None where they are on PATH, or in a container.

    Raises:
        UserError: A value of the request would break the script.
    """
    return _filled(TRAIN_SCRIPT, site, request, programs)


def command_script(site: SiteProfile, request: JobRequest, programs: str | None) -> str:
    """The script of a job that runs one command of Packhorse on one node; its arguments are the command's words.

    Raises:
        UserError: A value of the request would break the script.
    """
    return _filled(COMMAND_SCRIPT, site, request, programs)


def directives(site: SiteProfile, request: JobRequest) -> list[str]:
    """The options of sbatch, a line each.

    Raises:
        UserError: The job's name, or the path of its log, would break the block.
    """
    if SAFE_NAME.fullmatch(request.name) is None:
        raise _breaks("the name of the job", request.name, "name")
    output = Path(request.output)
    assert SAFE_LOG.fullmatch(output.name) is not None
    check_path(output.parent.parent)
    one = request.num_nodes == 1 and request.signal_seconds is None
    options = [
        ("job-name", request.name),
        ("account", site.account),
        ("partition", request.partition),
        ("qos", request.qos),
        ("constraint", request.constraint),
        ("nodes", request.num_nodes),
        ("ntasks", 1) if one else ("ntasks-per-node", 1),
        _gpus(site, request.gpus_per_node),
        ("cpus-per-task", request.cpus_per_node),
        ("mem", None if request.memory_mib is None else f"{request.memory_mib}M"),
        ("time", request.time),
        ("signal", None if request.signal_seconds is None else f"B:USR1@{request.signal_seconds}"),
        ("requeue" if site.requeue else "no-requeue", ""),
        ("open-mode", "append"),
        ("output", request.output),
        ("mail-user", site.mail),
        ("mail-type", ",".join(site.mail_on) if site.mail else None),
    ]
    words = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in options if value is not None]
    return [_with_note(word) for word in [*words, *request.options]]


def check_path(run_folder: Path) -> None:
    """Refuses a run folder that cannot stand in a `#SBATCH` line.

    Raises:
        UserError: It cannot.
    """
    if SAFE_PATH.fullmatch(str(run_folder)) is None:
        raise _breaks("the path of the run", str(run_folder), "runs_folder")


def site_lines(site: SiteProfile, programs: str | None, trains: bool) -> list[str]:
    """What a node needs before anything runs, as bash reads it."""
    lines = []
    if site.modules:
        lines += ["set +u                               # module's own scripts read variables that are not set"]
        lines += ["module purge", f"module load {' '.join(site.modules)} || exit 2", "set -u"]
    if programs is not None and not site.container:
        lines.append(f'export PATH={quoted(programs)}:"$PATH"')
    if site.network_interface:
        # NCCL takes `=name` for just this one, where `name` alone is a beginning; Gloo takes the name.
        lines.append(f"export NCCL_SOCKET_IFNAME=={site.network_interface} GLOO_SOCKET_IFNAME={site.network_interface}")
    lines += [f"export {name}={quoted(value)}" for name, value in site.environment.items()]
    lines.append(f"container=({' '.join(quoted(word) for word in site.container)})")
    if trains:
        lines.append(f"scratch={quoted(site.scratch) if site.scratch else '${TMPDIR:-/tmp}'}")
        lines.append(f"requeue={'yes' if site.requeue else 'no'}")
        lines.append(f"attempts_without_progress={site.attempts_without_progress}")
    return lines


def quoted(text: str) -> str:
    """A word as bash reads it back; `${env:NAME}` becomes the variable's value there, nothing else is expanded."""
    parts, end = [], 0
    for reference in ENVIRONMENT_REFERENCE.finditer(text):
        parts += [text[end : reference.start()], f'"${{{reference[1]}}}"']
        end = reference.end()
    parts.append(text[end:])
    words = [part if number % 2 else shlex.quote(part) for number, part in enumerate(parts) if part]
    return "".join(words) or "''"


def _filled(name: str, site: SiteProfile, request: JobRequest, programs: str | None) -> str:
    lines = shipped_path("slurm", name).read_text(encoding="utf-8").splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith(DIRECTIVE)]
    assert all(after == before + 1 for before, after in pairwise(at)), f"{name}: its #SBATCH lines form one block"
    begins, ends = lines.index(SITE_BEGINS), lines.index(SITE_ENDS)
    filled = [
        *lines[: at[0]],
        *directives(site, request),
        *lines[at[-1] + 1 : begins + 1],
        *site_lines(site, programs, trains=name == TRAIN_SCRIPT),
        *lines[ends:],
    ]
    return "\n".join(filled) + "\n"


def _gpus(site: SiteProfile, count: int) -> tuple[str, object]:
    if not count:
        return "gres", None
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if site.gpus_asked_by == "gres":
        return "gres", f"gpu:{kind}{count}"
    return "gpus-per-node", f"{kind}{count}"


def _with_note(word: str) -> str:
    note = NOTES.get(word.partition("=")[0])
    line = f"{DIRECTIVE}{word}"
    return f"{line:<{NOTE_COLUMN - 1}} # {note}" if note else line


def _breaks(what: str, value: str, field: str) -> UserError:
    return UserError(
        f"{what} is {value!a}.",
        "it stands in a #SBATCH line, where Slurm stops reading all options at a space and expands `%`.",
        f"set {field} to letters, digits and . _ - (in paths also / @ + , = :).",
    )


def show(words: Sequence[str]) -> str:
    """A command as it can be typed."""
    return shlex.join(words)
