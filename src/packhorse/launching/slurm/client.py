"""The only place that runs Slurm's programs: as lists of words, without a shell, each with a time-out.

Their text is the interface: `--json` came late and differs by version, and the C library is not installed for Python.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from packhorse.errors import UserError

ANSWER_SECONDS: Final = 60.0
"""How long Slurm may take to answer; its own MessageTimeout is 10 s by default, and programs try again."""
LIVE: Final = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD",
               "REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT")  # fmt: skip
WAITING: Final = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
NO_CLUSTER: Final = "Could not establish a configuration source"
STARTS = re.compile(r"to start at (\S+) using (\d+) processors on nodes (\S+) in partition (\S+)")
FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=")
NO_VALUE: Final = ("", "(null)", "N/A", "Unknown", "None", "UNLIMITED", "n/a")


class SlurmError(UserError):
    """Slurm refused, or did not answer; `said` holds its own words."""

    def __init__(self, program: str, said: str, fix: str) -> None:
        self.said = said
        super().__init__(f"{program} says: {said or 'nothing'}", "Slurm did not do what it was asked to.", fix)


class NoSlurmError(UserError):
    """Slurm's programs are not on PATH, or know of no cluster."""

    def __init__(self, program: str, found: bool = False) -> None:
        super().__init__(
            f"there is no Slurm here: {program} " + ("knows of no cluster." if found else "is not on PATH."),
            "jobs are submitted with Slurm's own programs.",
            "type this on a login node of the cluster; --dry-run shows the script anywhere.",
        )


@dataclass(frozen=True)
class Expected:
    """What `sbatch --test-only` says; nothing is queued.

    Attributes:
        starts_at: Unix seconds; None where Slurm does not say.
        nodes: As Slurm writes them, such as `node[1-2]`.
        partition: Where it would run.
        note: Why it may not start for now, in words.
    """

    starts_at: float | None
    nodes: str
    partition: str
    note: str = ""


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array, as Slurm knows it now.

    Attributes:
        job_id: `12`, or `12_3` of an array; tasks that wait together are `12_[3-5]`.
        state: Slurm's word, such as `PENDING` (https://slurm.schedmd.com/squeue.html, job state codes).
        reason: Why it waits or ended, such as `Dependency`; empty where there is none.
        expected_start: Unix seconds: when it began, or may begin; None where Slurm does not say.
        restarts: How often it was queued again.
        nodes: Where it runs.
        exit_code: `0:0`: its exit code, and the signal that ended it.
        time_limit: As Slurm writes it, such as `1-00:00:00`.
    """

    job_id: str
    state: str
    reason: str = ""
    expected_start: float | None = None
    restarts: int = 0
    nodes: str = ""
    exit_code: str = ""
    time_limit: str = ""

    @property
    def is_live(self) -> bool:
        """It waits, runs, or is about to."""
        return self.state in LIVE

    @property
    def is_waiting(self) -> bool:
        """It has not begun, or is queued again."""
        return self.state in WAITING


def submit_script(words: Sequence[str]) -> str:
    """Runs `sbatch --parsable WORDS`.

    Args:
        words: Options, the script, and its arguments.

    Returns:
        The job's number.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: It was refused.
    """
    out, _ = _ask(["sbatch", "--parsable", *words])
    return out.strip().splitlines()[-1].split(";")[0]  # behind `;` stands the name of the cluster


def expect_start(script: str, options: Sequence[str] = ()) -> Expected:
    """Runs `sbatch --test-only` on the text of a script; queues nothing.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: The job would be refused.
    """
    _, err = _ask(["sbatch", "--test-only", *options], script)
    found = STARTS.search(err)
    return Expected(_time(found[1]), found[3], found[4]) if found else Expected(None, "", "")


def job_states(ids: Sequence[str]) -> dict[str, JobState]:
    """What Slurm knows of jobs; without those that it has forgotten, and it has no accounting to remember them.

    Args:
        ids: Numbers as `submit_script` gave them; of an array each task has an entry of its own.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: It does not answer.
    """
    found: dict[str, JobState] = {}
    for job_id in dict.fromkeys(ids):
        states = _in_memory(job_id) or _in_accounting(job_id)
        found |= {state.job_id: state for state in states}
    return found


def cancel(ids: Sequence[str]) -> None:
    """Ends jobs; those that have ended stay as they are.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: Slurm refuses, or does not answer.
    """
    _ask(["scancel", "--", *ids])


def depend_on_any(job_id: str, ids: Sequence[str]) -> None:
    """Lets a job that waits begin once one of these has ended well, in place of what it waited for.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: Slurm refuses, or does not answer.
    """
    any_of = "?".join(f"afterok:{each}" for each in ids)
    _ask(["scontrol", "update", f"JobId={job_id}", f"Dependency={any_of}"])


def partitions() -> list[dict[str, str]]:
    """Each partition as `scontrol show partition` shows it: PartitionName, MaxTime, AllowAccounts, Nodes, TRES …"""
    return _records(_ask(["scontrol", "--oneliner", "--all", "show", "partition"])[0])


def nodes() -> list[dict[str, str]]:
    """Each node as `scontrol show node` shows it: NodeName, Gres, CPUTot, RealMemory, Partitions …"""
    return _records(_ask(["scontrol", "--oneliner", "--all", "show", "node"])[0])


def associations() -> list[tuple[str, str, tuple[str, ...]]]:
    """Account, partition and QOS that this user may name; empty where the site keeps no accounts.

    A partition that is empty stands for all.
    """
    user = f"user={pwd.getpwuid(os.getuid()).pw_name}"
    try:
        out, _ = _ask(["sacctmgr", "--noheader", "--parsable2", "show", "assoc", user, "format=account,partition,qos"])
    except UserError:
        return []
    rows = [line.split("|") for line in out.splitlines() if line.count("|") == 2]
    return [(account, partition, tuple(qos.split(","))) for account, partition, qos in rows]


def _in_memory(job_id: str) -> list[JobState]:
    try:
        out, _ = _ask(["scontrol", "--oneliner", "show", "job", job_id])
    except SlurmError as error:
        if "Invalid job id" in error.said:
            return []
        raise
    return [_of_controller(record) for record in _records(out)]


def _of_controller(record: Mapping[str, str]) -> JobState:
    job_id, array, task = (record.get(name, "") for name in ("JobId", "ArrayJobId", "ArrayTaskId"))
    if array:
        job_id = f"{array}_{task if task.isdecimal() else f'[{task}]'}"
    return JobState(
        job_id,
        record["JobState"],
        _known(record.get("Reason", "")),
        _time(record.get("StartTime", "")),
        int(record.get("Restarts", "0")),
        _known(record.get("NodeList", "")),
        record.get("ExitCode", ""),
        record.get("TimeLimit", ""),
    )


def _in_accounting(job_id: str) -> list[JobState]:
    """As `sacct` remembers it, where there is a database."""
    fields = "jobid,state,reason,start,nodelist,exitcode,timelimit"
    try:
        out, _ = _ask(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", f"--format={fields}"])
    except UserError:
        return []
    rows = [line.split("|") for line in out.splitlines() if line.count("|") == fields.count(",")]
    return [
        JobState(number, state.split()[0], _known(reason), _time(start), 0, _known(on), code, limit)
        for number, state, reason, start, on, code, limit in rows
        if state
    ]


def _ask(words: Sequence[str], text: str = "") -> tuple[str, str]:
    """What a program prints on both outputs."""
    program = shutil.which(words[0])
    if program is None:
        raise NoSlurmError(words[0])
    try:
        done = subprocess.run(  # noqa: S603
            [program, *words[1:]],
            input=text,
            env=_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        said = f"nothing for {ANSWER_SECONDS:.0f} s"
        raise SlurmError(words[0], said, "see whether `sinfo` answers, and try again.") from None
    if done.returncode and NO_CLUSTER in done.stderr:
        raise NoSlurmError(words[0], found=True)
    if done.returncode:
        raise SlurmError(words[0], _reason(done.stderr or done.stdout), f"see `man {words[0]}`.")
    return done.stdout, done.stderr


def _environment() -> dict[str, str]:
    """Ours without what belongs to the job that we may stand in: its sizes would become those of a new one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    return {**kept, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


def _reason(said: str) -> str:
    """The last line that is not empty, without the name of the program before it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return re.sub(r"^(sbatch|scontrol|scancel|sacct|sacctmgr|sinfo|squeue): (error: )?", "", lines[-1]) if lines else ""


def _records(text: str) -> list[dict[str, str]]:
    """Lines of `Key=value Key=value`; a value may hold spaces."""
    found = []
    for line in text.splitlines():
        marks = list(FIELD.finditer(line))
        ends = [mark.start() for mark in marks[1:]] + [len(line)]
        record = {mark[1]: line[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}
        if record:
            found.append(record)
    return found


def _known(value: str) -> str:
    return "" if value in NO_VALUE else value


def _time(text: str) -> float | None:
    """Slurm writes the controller's local time, which is taken to be ours."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
