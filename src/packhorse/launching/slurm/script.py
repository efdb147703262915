"""Job scripts: the shipped ones, with their `#SBATCH` block and the lines of the site filled in.

All other lines stay as shipped and reviewed. No value can end the block or be executed: `#SBATCH` values match strict
patterns (a space makes Slurm ignore every later directive), and values that bash reads are quoted.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
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
    "--ntasks-per-node": "one launcher per node; it starts one rank per GPU",
    "--signal": "to this script, N seconds before the time limit",
    "--open-mode": "or every restart truncates the log",
}
NOTE_COLUMN: Final = 37

STEP_METRIC: Final = "speed/step_seconds"
SAVE_METRIC: Final = "checkpoint/seconds"
LEAST_SAVE_SECONDS: Final = 120
"""Least time for a step and a save together: estimates may be wrong, and short runs measure little."""
EXIT_SECONDS: Final = 60
"""Time for ranks to exit and the job to requeue. Slurm may signal up to 60 s early (sbatch, --signal): more time."""
SAVED_BYTES_PER_SECOND: Final = 200e6
"""Estimate without a measurement: a shared disk in use by others, with the checkpoint read back."""


@dataclass(frozen=True)
class SignalLead:
    """How long before its time limit a job is signalled to save.

    Attributes:
        seconds: Seconds before the time limit.
        reason: How they were computed.
    """

    seconds: int
    reason: str


@dataclass(frozen=True)
class JobRequest:
    """Resources that one job requests from Slurm.

    Attributes:
        name: Name of the job.
        output: Absolute path of its log; Slurm replaces `%j` by the job's number.
        time: Time limit, such as `24:00:00`.
        num_nodes: Number of nodes, with one task each.
        gpus_per_node: GPUs per node.
        cpus_per_node: CPUs per node; None for the site's default.
        memory_mib: Memory per node in MiB; None for the partition's default.
        partition: Partition; None for the site's default.
        qos: Quality of service.
        signal_seconds: How long before the time limit Slurm signals the script; None for no signal.
        constraint: Features that the nodes must have.
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


def signal_lead(
    metrics: Iterable[Mapping[str, float]], step_seconds: float | None, checkpoint_bytes: int | None
) -> SignalLead:
    """Return the lead for the longest measured step and save; estimates replace missing measurements.

    Args:
        metrics: Lines of RUN/metrics.jsonl.
        step_seconds: Planned duration of one step; None if unknown.
        checkpoint_bytes: Planned size of one checkpoint; None if unknown.
    """
    lines = list(metrics)
    steps = [line[STEP_METRIC] for line in lines if STEP_METRIC in line]
    saves = [line[SAVE_METRIC] for line in lines if SAVE_METRIC in line]
    step = max(steps) if steps else step_seconds or 0.0
    save = max(saves) if saves else (checkpoint_bytes or 0) / SAVED_BYTES_PER_SECOND
    reason = f"a step of {step:,.1f} s and a save of {save:,.1f} s " + ("were measured" if saves else "are expected")
    if not step + save:
        reason = "the duration of a step and a save is unknown"
    needed = math.ceil(step + save)
    least = f", {LEAST_SAVE_SECONDS} s at least" if needed < LEAST_SAVE_SECONDS else ""
    seconds = max(needed, LEAST_SAVE_SECONDS) + EXIT_SECONDS
    return SignalLead(seconds, f"{reason}{least}, plus {EXIT_SECONDS} s to exit")


def train_request(
    site: SiteProfile, name: str, logs: Path, num_nodes: int, gpus_per_node: int, time: str, signal_seconds: int
) -> JobRequest:
    """Return the request of a training job, with the site's CPUs and memory for its GPUs."""
    request = gpu_request(site, name, logs, "job", gpus_per_node)
    return replace(request, name=name, time=time, num_nodes=num_nodes, signal_seconds=signal_seconds)


def gpu_request(site: SiteProfile, name: str, logs: Path, kind: str, gpus: int) -> JobRequest:
    """Return the request of a job that runs one command on GPUs of one node; on its CPUs at a site without GPUs."""
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
    """Return the request of a job that runs one command without GPUs."""
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


def job_script(site: SiteProfile, request: JobRequest, programs: str | None) -> str:
    """Return the script of a job: its argument is the run folder, or the words of a command of Packhorse.

    Args:
        site: Profile of the cluster.
        request: Resources of the job; only a training job is signalled before its end.
        programs: Folder of python and accelerate on the nodes; None if they are on PATH.

    Raises:
        UserError: A value of the request would break the script.
    """
    trains = request.signal_seconds is not None
    name = TRAIN_SCRIPT if trains else COMMAND_SCRIPT
    lines = shipped_path("slurm", name).read_text(encoding="utf-8").splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith(DIRECTIVE)]
    assert all(after == before + 1 for before, after in pairwise(at)), f"{name}: its #SBATCH lines form one block"
    begins, ends = lines.index(SITE_BEGINS), lines.index(SITE_ENDS)
    filled = [
        *lines[: at[0]],
        *directives(site, request),
        *lines[at[-1] + 1 : begins + 1],
        *site_lines(site, programs, trains),
        *lines[ends:],
    ]
    return "\n".join(filled) + "\n"


def directives(site: SiteProfile, request: JobRequest) -> list[str]:
    """Return the `#SBATCH` lines.

    Raises:
        UserError: The job's name or the path of its log would break the block.
    """
    if SAFE_NAME.fullmatch(request.name) is None:
        raise _unsafe("the name of the job", request.name, "name")
    output = Path(request.output)
    assert SAFE_LOG.fullmatch(output.name) is not None
    check_path(output.parent.parent)
    is_single = request.num_nodes == 1 and request.signal_seconds is None
    options = [
        ("job-name", request.name),
        ("account", site.account),
        ("partition", request.partition),
        ("qos", request.qos),
        ("constraint", request.constraint),
        ("nodes", request.num_nodes),
        ("ntasks", 1) if is_single else ("ntasks-per-node", 1),
        _gpu_option(site, request.gpus_per_node),
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
    """Refuse a run folder whose path is unsafe in a `#SBATCH` line.

    Raises:
        UserError: The path is unsafe.
    """
    if SAFE_PATH.fullmatch(str(run_folder)) is None:
        raise _unsafe("the path of the run", str(run_folder), "runs_folder")


def site_lines(site: SiteProfile, programs: str | None, trains: bool) -> list[str]:
    """Return the bash lines that prepare a node before any program runs."""
    lines = []
    if site.modules:
        lines += ["set +u                               # the scripts of `module` read unset variables"]
        lines += ["module purge", f"module load {' '.join(site.modules)} || exit 2", "set -u"]
    if programs is not None and not site.container:
        lines.append(f'export PATH={quoted(programs)}:"$PATH"')
    if site.network_interface:
        # NCCL matches `=name` exactly and `name` as a prefix; Gloo takes the plain name.
        lines.append(f"export NCCL_SOCKET_IFNAME=={site.network_interface} GLOO_SOCKET_IFNAME={site.network_interface}")
    lines += [f"export {name}={quoted(value)}" for name, value in site.environment.items()]
    lines.append(f"container=({' '.join(quoted(word) for word in site.container)})")
    if trains:
        lines.append(f"scratch={quoted(site.scratch) if site.scratch else '${TMPDIR:-/tmp}'}")
        lines.append(f"requeue={'yes' if site.requeue else 'no'}")
        lines.append(f"attempts_without_progress={site.attempts_without_progress}")
    return lines


def quoted(text: str) -> str:
    """Quote a word for bash; `${env:NAME}` becomes a reference to the variable, and nothing else is expanded."""
    parts, end = [], 0
    for reference in ENVIRONMENT_REFERENCE.finditer(text):
        parts += [text[end : reference.start()], f'"${{{reference[1]}}}"']
        end = reference.end()
    parts.append(text[end:])
    words = [part if number % 2 else shlex.quote(part) for number, part in enumerate(parts) if part]
    return "".join(words) or "''"


def _gpu_option(site: SiteProfile, count: int) -> tuple[str, object]:
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


def _unsafe(what: str, value: str, field: str) -> UserError:
    return UserError(
        f"{what} is {value!a}.",
        "it is part of a #SBATCH line, where Slurm ignores all later options after a space, and expands `%`.",
        f"set {field} to letters, digits and . _ - (in paths also / @ + , = :).",
    )
