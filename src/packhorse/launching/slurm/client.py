"""SlurmClient: the only code that runs Slurm's programs, as argument lists without a shell, each with a timeout.

The programs' text output is parsed: `--json` appeared late and differs by version, and Slurm's C library has no package
for Python.
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

TIMEOUT_SECONDS: Final = 60.0
"""Slurm's own MessageTimeout is 10 s by default, and its programs retry."""
LIVE: Final = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD",
               "REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT")  # fmt: skip
WAITING: Final = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
NO_CLUSTER: Final = "Could not establish a configuration source"
START = re.compile(r"to start at (\S+) using (\d+) processors on nodes (\S+) in partition (\S+)")
FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=")
NO_VALUE: Final = ("", "(null)", "N/A", "Unknown", "None", "UNLIMITED", "n/a")


class SlurmError(UserError):
    """Slurm refused a request or did not answer; `output` holds its message."""

    def __init__(self, program: str, output: str, fix: str) -> None:
        self.output = output
        super().__init__(f"{program} failed: {output or 'no output'}", "Slurm did not do what was requested.", fix)


class NoSlurmError(UserError):
    """Slurm's programs are not on PATH, or are not configured for a cluster."""

    def __init__(self, program: str, is_installed: bool = False) -> None:
        super().__init__(
            "there is no Slurm here: " + (f"{program} knows no cluster." if is_installed else f"no {program} on PATH."),
            "jobs are submitted with Slurm's own programs.",
            "run this on a login node of the cluster; --dry-run shows the script anywhere.",
        )


@dataclass(frozen=True)
class StartEstimate:
    """Answer of `sbatch --test-only`, which queues nothing.

    Attributes:
        starts_at: Start in Unix seconds, as Slurm expects it; None where it gives none.
        nodes: Nodes as Slurm writes them, such as `node[1-2]`.
        partition: Partition that the job would run in.
        note: Why the job may not start for now; empty without such a reason.
    """

    starts_at: float | None
    nodes: str
    partition: str
    note: str = ""


@dataclass(frozen=True)
class JobState:
    """State of one job, or of one task of a job array, in Slurm.

    Attributes:
        job_id: `12`, or `12_3` in an array; tasks that wait together are `12_[3-5]`.
        state: Slurm's state, such as `PENDING` (https://slurm.schedmd.com/squeue.html, job state codes).
        reason: Slurm's reason why it waits or ended, such as `Dependency`; empty without one.
        expected_start: Unix seconds of its actual or expected start; None where Slurm gives none.
        restarts: Number of requeues.
        nodes: Nodes that it runs on.
        exit_code: `0:0`: exit code and signal.
        time_limit: Time limit as Slurm writes it, such as `1-00:00:00`.
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
        """Whether the job waits or runs."""
        return self.state in LIVE

    @property
    def is_waiting(self) -> bool:
        """Whether the job waits for its start, or for its restart after a requeue."""
        return self.state in WAITING


class SlurmClient:
    """Slurm's programs as methods.

    Each method but `associations` raises NoSlurmError without Slurm on this machine, and SlurmError if Slurm refuses or
    does not answer.
    """

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds

    def submit(self, arguments: Sequence[str]) -> str:
        """Run `sbatch --parsable ARGUMENTS` and return the job's number.

        Args:
            arguments: Options, the script, and the script's arguments.
        """
        out, _ = self._run(["sbatch", "--parsable", *arguments])
        return out.strip().splitlines()[-1].split(";")[0]  # `12;CLUSTER` in a federation

    def estimate_start(self, script: str) -> StartEstimate:
        """Run `sbatch --test-only` on the text of a script, which queues nothing."""
        _, err = self._run(["sbatch", "--test-only"], script)
        match = START.search(err)
        return StartEstimate(_time(match[1]), match[3], match[4]) if match else StartEstimate(None, "", "")

    def job_states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return the state of each job, and of each task of an array, by number.

        Jobs that Slurm has forgotten are absent, unless its accounting database remembers them.
        """
        states: dict[str, JobState] = {}
        for job_id in dict.fromkeys(job_ids):
            for state in self._states_in_controller(job_id) or self._states_in_accounting(job_id):
                states[state.job_id] = state
        return states

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancel jobs; jobs that have ended are unaffected."""
        self._run(["scancel", "--", *job_ids])

    def depend_on_any(self, job_id: str, dependencies: Sequence[str]) -> None:
        """Replace the dependency of a waiting job: it starts after any of these jobs has succeeded."""
        any_of = "?".join(f"afterok:{dependency}" for dependency in dependencies)
        self._run(["scontrol", "update", f"JobId={job_id}", f"Dependency={any_of}"])

    def partitions(self) -> list[dict[str, str]]:
        """Return the fields of each partition: PartitionName, MaxTime, AllowAccounts, Nodes, TRES …"""
        return _records(self._run(["scontrol", "--oneliner", "--all", "show", "partition"])[0])

    def nodes(self) -> list[dict[str, str]]:
        """Return the fields of each node: NodeName, Gres, CPUTot, RealMemory, Partitions …"""
        return _records(self._run(["scontrol", "--oneliner", "--all", "show", "node"])[0])

    def associations(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Return account, partition and QOS names that this user may request; an empty partition means any.

        The list is empty at a site without accounting.
        """
        user = f"user={pwd.getpwuid(os.getuid()).pw_name}"
        fields = "format=account,partition,qos"
        try:
            out, _ = self._run(["sacctmgr", "--noheader", "--parsable2", "show", "assoc", user, fields])
        except UserError:
            return []
        rows = [line.split("|") for line in out.splitlines() if line.count("|") == 2]
        return [(account, partition, tuple(qos.split(","))) for account, partition, qos in rows]

    def _states_in_controller(self, job_id: str) -> list[JobState]:
        try:
            out, _ = self._run(["scontrol", "--oneliner", "show", "job", job_id])
        except SlurmError as error:
            if "Invalid job id" in error.output:
                return []
            raise
        return [_state_of_record(record) for record in _records(out)]

    def _states_in_accounting(self, job_id: str) -> list[JobState]:
        fields = "jobid,state,reason,start,nodelist,exitcode,timelimit"
        try:
            out, _ = self._run(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", f"--format={fields}"])
        except UserError:
            return []
        rows = [line.split("|") for line in out.splitlines() if line.count("|") == fields.count(",")]
        return [
            JobState(number, state.split()[0], _known(reason), _time(start), 0, _known(nodes), code, limit)
            for number, state, reason, start, nodes, code, limit in rows
            if state
        ]

    def _run(self, command: Sequence[str], text: str = "") -> tuple[str, str]:
        """Run a program with `text` on standard input; return its standard output and standard error."""
        program = shutil.which(command[0])
        if program is None:
            raise NoSlurmError(command[0])
        try:
            done = subprocess.run(  # noqa: S603
                [program, *command[1:]],
                input=text,
                env={**environment_outside_jobs(), "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            output = f"no answer within {self._timeout_seconds:.0f} s"
            raise SlurmError(command[0], output, "check that `sinfo` answers, and try again.") from None
        if done.returncode and NO_CLUSTER in done.stderr:
            raise NoSlurmError(command[0], is_installed=True)
        if done.returncode:
            raise SlurmError(command[0], _last_line(done.stderr or done.stdout), f"see `man {command[0]}`.")
        return done.stdout, done.stderr


def environment_outside_jobs() -> dict[str, str]:
    """Return the environment without the variables of a surrounding job, whose sizes a new job would inherit."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}


def _state_of_record(record: Mapping[str, str]) -> JobState:
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


def _last_line(output: str) -> str:
    """Return the last line that is not empty, without the program's name before it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return re.sub(r"^(sbatch|scontrol|scancel|sacct|sacctmgr|sinfo|squeue): (error: )?", "", lines[-1]) if lines else ""


def _records(text: str) -> list[dict[str, str]]:
    """Parse lines of `Key=value Key=value`, whose values may contain spaces."""
    records = []
    for line in text.splitlines():
        keys = list(FIELD.finditer(line))
        ends = [key.start() for key in keys[1:]] + [len(line)]
        record = {key[1]: line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}
        if record:
            records.append(record)
    return records


def _known(value: str) -> str:
    return "" if value in NO_VALUE else value


def _time(text: str) -> float | None:
    """Parse a time that Slurm writes in the controller's time zone, which is taken to be ours."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
