"""SiteProfile: what a cluster is like, written once and given with `--site`; docs/slurm.md shows each field.

Values reach `#SBATCH` lines, where a space would make Slurm ignore every later line: each has a strict pattern.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field, PositiveInt, model_validator

from packhorse.recipe.section import Name, Section

SITE_FILE: Final = "site.yaml"
"""Taken where `--site` is not given."""
TEXT: Final = r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$"
REFERENCE: Final = r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}"
DURATION = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
SCALES: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Slurm's units of memory: KiB, MiB …"""


def _text(pattern: str, words: str) -> object:
    return Field(pattern=pattern, json_schema_extra={"takes": words})


Word = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._,@-]{0,99}$", "a name of letters, digits, `.`, `_`, `-`")]
Constraint = Annotated[str, _text(r"^[A-Za-z0-9(\[][A-Za-z0-9._&|*()\[\],:-]{0,199}$", "features, such as a100&ib")]
Memory = Annotated[str, _text(r"^[1-9][0-9]{0,8}[KMGT]$", "a number and its unit, such as 64G")]
Duration = Annotated[
    str, _text(r"^([0-9]{1,3}-)?[0-9]{1,2}:[0-5][0-9]:[0-5][0-9]$", "hours, minutes and seconds, such as 24:00:00")
]
Folder = Annotated[
    str,
    _text(
        rf"^(/[A-Za-z0-9._@+,=:-]*|{REFERENCE})(/?[A-Za-z0-9._@+,=:-]|/?{REFERENCE})*$",
        "an absolute path without spaces; ${env:NAME} stands for a variable of the job",
    ),
]
Interface = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$", "a name as `ip link` shows it, such as ib0")]
Module = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._/+-]{0,99}$", "a name as `module avail` shows it")]
Variable = Annotated[str, _text(r"^[A-Za-z_][A-Za-z0-9_]{0,99}$", "the name of a variable")]
Line = Annotated[str, _text(TEXT, "text on one line")]
Option = Annotated[
    str, _text(r"^--[a-z][a-z-]{1,39}(=[A-Za-z0-9._,:/@*+%()\[\]=-]{1,200})?$", "an option, such as --exclusive")
]
Mail = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}@[A-Za-z0-9.-]{1,190}$", "a mail address")]
Event = Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_90", "ALL"]

OURS: Final = ("SLURM_", "SBATCH_", "PACKHORSE_", "MASTER_", "PET_")
"""Variables that Slurm or the job script sets begin with one of these."""
TAKEN: Final = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gres", "cpus-per-task", "mem", "time", "signal",
    "requeue", "no-requeue", "open-mode", "output", "error", "account", "partition", "qos", "constraint", "mail-user",
    "mail-type", "dependency", "array", "wrap", "parsable", "test-only", "chdir", "gpus", "ntasks-per-gpu",
    "kill-on-invalid-dep", "input", "export",
)  # fmt: skip
"""Options that have a field of their own, or that the job script stands on."""


class CpuJobs(Section):
    """Jobs that need no GPU: data is prepared in one, so that no GPU waits for rows."""

    partition: Word | None = None
    """Partition for them; absent, that of training."""
    qos: Word | None = None
    """QOS for them; absent, that of training."""
    cpus: PositiveInt = 8
    """CPUs of such a job."""
    memory: Memory | None = None
    """Its memory; absent, what the partition gives."""
    time: Duration = "04:00:00"
    """Its time limit."""


class SiteProfile(Section):
    """A cluster: how jobs are asked for there, and what they find on a node."""

    name: Name
    """What the profile is called in messages."""
    account: Word | None = None
    """Account that is charged (`sacctmgr show assoc user=$USER` lists yours)."""
    partition: Word | None = None
    """Partition, or several with commas between; absent, the site's default."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Constraint | None = None
    """Features that nodes must have."""
    options: list[Option] = []
    """Further options of sbatch, such as `--exclusive` or `--reservation=course`."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 8
    """GPUs of a node; 0: the nodes have none, and training runs on their CPUs."""
    gpus_asked_by: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Which option asks for GPUs: `--gpus-per-node=8`, or `--gres=gpu:8` where the site wants that."""
    gpu_type: Word | None = None
    """Name of the GPUs in Slurm, where one must be given: `h100` asks by `--gres=gpu:h100:8`."""
    gpu: Line | None = None
    """Name of the GPUs for the memory check, as `packhorse plan --gpus` takes it, such as `H100-80GB`."""
    network_gbit: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)] | None = None
    """Gbit/s of one GPU between nodes, for the time that the plan expects."""
    cpus_per_gpu: PositiveInt | None = None
    """CPUs asked for with each GPU; absent, the site's own default."""
    cpus_per_node: PositiveInt | None = None
    """CPUs asked for on a node without GPUs."""
    memory_per_gpu: Memory | None = None
    """Host memory asked for with each GPU; absent, what the partition gives."""
    memory_per_node: Memory | None = None
    """Host memory asked for on each node, in place of `memory_per_gpu`."""
    time: Duration = "24:00:00"
    """Time limit of a job where `--time` is not given; a run that takes longer goes on in the next job."""
    longest_time: Duration | None = None
    """Most that the site allows; more is refused before Slurm is asked."""
    requeue: bool = True
    """Whether a job may be queued again; where not, another job that depends on it goes on."""
    attempts_without_progress: PositiveInt = 3
    """Attempts in a row that gain no step before a run gives up; there is no bound while it gains any."""
    cpu_jobs: CpuJobs = CpuJobs()
    """Jobs that need no GPU."""
    modules: list[Module] = []
    """Environment modules to load, in this order, after `module purge`."""
    programs: Folder | None = None
    """Folder of python and accelerate on the nodes; absent, of the Packhorse that submits."""
    environment: dict[Variable, Line] = {}
    """Variables to set; `${env:NAME}` in a value stands for another one. Never a secret."""
    container: list[Line] = []
    """Words before each command on a node, such as `[apptainer, exec, --nv, /shared/packhorse.sif]`."""
    network_interface: Interface | None = None
    """Interface between the nodes, where NCCL and Gloo would take another one."""
    scratch: Folder | None = None
    """Fast folder of each node's own; absent, `$TMPDIR` or /tmp."""
    shared: list[Folder] = []
    """Folders that every node sees; a run folder elsewhere is refused. Empty: not checked."""
    mail: Mail | None = None
    """Where Slurm sends mail."""
    mail_on: list[Event] = ["END", "FAIL"]
    """When it does."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> SiteProfile:
        for word in self.options:
            name = word.removeprefix("--").partition("=")[0]
            if name in TAKEN:
                raise ValueError(f"options holds {word}, which has a field of its own or is set by the job script")
        for variable in self.environment:
            if variable.startswith(OURS):
                raise ValueError(f"environment sets {variable}, which Slurm or the job script sets")
        if self.memory_per_gpu and self.memory_per_node:
            raise ValueError("memory_per_gpu and memory_per_node are both given; one of them says it")
        if self.gpus_per_node and self.cpus_per_node:
            raise ValueError("cpus_per_node is for nodes without GPUs; write cpus_per_gpu")
        if self.container and self.programs:
            raise ValueError("programs and container are both given, and a container brings its own programs")
        if self.longest_time and seconds_of(self.time) > seconds_of(self.longest_time):
            raise ValueError(f"time is {self.time}, more than longest_time {self.longest_time}")
        return self


def seconds_of(duration: str) -> int:
    """Seconds of `24:00:00` or `1-00:00:00`."""
    found = DURATION.fullmatch(duration)
    assert found is not None, "durations are checked when they are read"
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def mebibytes_of(memory: str) -> int:
    """MiB of `64G`, rounded up."""
    return -(-int(memory[:-1]) * SCALES[memory[-1]] // 2**20)
