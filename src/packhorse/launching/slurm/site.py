"""SiteProfile: the description of a cluster that `--site` takes; docs/slurm.md lists each field.

Values become part of `#SBATCH` lines, where a space makes Slurm ignore every later line: each has a strict pattern.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field, PositiveInt, model_validator

from packhorse.recipe.section import Name, Section

SITE_FILE: Final = "site.yaml"
"""Default of `--site`."""
TEXT: Final = r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$"
REFERENCE: Final = r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}"
DURATION = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
SCALES: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Slurm's units of memory, in bytes: KiB, MiB …"""


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
        "an absolute path without spaces; ${env:NAME} is a variable of the job",
    ),
]
Interface = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$", "a name from `ip link`, such as ib0")]
Module = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._/+-]{0,99}$", "a name from `module avail`")]
Variable = Annotated[str, _text(r"^[A-Za-z_][A-Za-z0-9_]{0,99}$", "the name of a variable")]
Line = Annotated[str, _text(TEXT, "text on one line")]
Option = Annotated[
    str, _text(r"^--[a-z][a-z-]{1,39}(=[A-Za-z0-9._,:/@*+%()\[\]=-]{1,200})?$", "an option, such as --exclusive")
]
Mail = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}@[A-Za-z0-9.-]{1,190}$", "a mail address")]
Event = Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_90", "ALL"]

RESERVED_PREFIXES: Final = ("SLURM_", "SBATCH_", "PACKHORSE_", "MASTER_", "PET_")
"""Prefixes of variables that Slurm or the job script sets."""
RESERVED_OPTIONS: Final = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gres", "cpus-per-task", "mem", "time", "signal",
    "requeue", "no-requeue", "open-mode", "output", "error", "account", "partition", "qos", "constraint", "mail-user",
    "mail-type", "dependency", "array", "wrap", "parsable", "test-only", "chdir", "gpus", "ntasks-per-gpu",
    "kill-on-invalid-dep", "input", "export",
)  # fmt: skip
"""Options with their own field, or that the job script sets."""


class CpuJobs(Section):
    """Jobs that need no GPU, such as preparing the data before the training job starts."""

    partition: Word | None = None
    """Partition of these jobs; default: the partition of training."""
    qos: Word | None = None
    """QOS of these jobs; default: the QOS of training."""
    cpus: PositiveInt = 8
    """CPUs of each job."""
    memory: Memory | None = None
    """Memory of each job; default: the default of the partition."""
    time: Duration = "04:00:00"
    """Time limit of each job."""


class SiteProfile(Section):
    """A cluster: how to request jobs, and what its nodes provide."""

    name: Name
    """Name of the profile in messages."""
    account: Word | None = None
    """Account to charge (`sacctmgr show assoc user=$USER` lists yours)."""
    partition: Word | None = None
    """Partition, or several separated by commas; default: the default of the site."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Constraint | None = None
    """Features that nodes must have."""
    options: list[Option] = []
    """Further options of sbatch, such as `--exclusive` or `--reservation=course`."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 8
    """GPUs of each node; 0: the nodes have none, and training runs on their CPUs."""
    gpus_asked_by: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Option that requests GPUs: `--gpus-per-node=8`, or `--gres=gpu:8` if the site requires it."""
    gpu_type: Word | None = None
    """Name of the GPUs in Slurm, if the site requires one: `h100` requests `--gres=gpu:h100:8`."""
    gpu: Line | None = None
    """Name of the GPUs for the memory check, as in `packhorse plan --gpus`, such as `H100-80GB`."""
    network_gbit: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)] | None = None
    """Network bandwidth of one GPU between nodes in Gbit/s, for the time that the plan predicts."""
    cpus_per_gpu: PositiveInt | None = None
    """CPUs to request per GPU; default: the default of the site."""
    cpus_per_node: PositiveInt | None = None
    """CPUs to request on each node without GPUs."""
    memory_per_gpu: Memory | None = None
    """Host memory to request per GPU; default: the default of the partition."""
    memory_per_node: Memory | None = None
    """Host memory to request per node, instead of `memory_per_gpu`."""
    time: Duration = "24:00:00"
    """Time limit of a job if `--time` is not given; a longer run resumes in the next job."""
    longest_time: Duration | None = None
    """Longest time limit that the site allows; a longer one is refused before submission."""
    requeue: bool = True
    """Whether Slurm may requeue a job; if not, the run resumes in a dependent job."""
    attempts_without_progress: PositiveInt = 3
    """Consecutive attempts without a completed step after which a run ends; attempts with steps are unlimited."""
    cpu_jobs: CpuJobs = CpuJobs()
    """Jobs that need no GPU."""
    modules: list[Module] = []
    """Environment modules to load, in this order, after `module purge`."""
    programs: Folder | None = None
    """Folder of python and accelerate on the nodes; default: the one of the Packhorse that submits."""
    environment: dict[Variable, Line] = {}
    """Variables to set; `${env:NAME}` in a value refers to another variable. Never a secret."""
    container: list[Line] = []
    """Words to put before each command on a node, such as `[apptainer, exec, --nv, /shared/packhorse.sif]`."""
    network_interface: Interface | None = None
    """Network interface between the nodes, if NCCL and Gloo would select another one."""
    scratch: Folder | None = None
    """Fast local folder of each node; default: `$TMPDIR` or /tmp."""
    shared: list[Folder] = []
    """Folders that all nodes share; a run folder elsewhere is refused. Empty: not checked."""
    mail: Mail | None = None
    """Address to which Slurm sends mail."""
    mail_on: list[Event] = ["END", "FAIL"]
    """Events for which Slurm sends mail."""

    @model_validator(mode="after")
    def _consistent(self) -> SiteProfile:
        for word in self.options:
            name = word.removeprefix("--").partition("=")[0]
            if name in RESERVED_OPTIONS:
                raise ValueError(f"options holds {word}, which has its own field or is set by the job script")
        for variable in self.environment:
            if variable.startswith(RESERVED_PREFIXES):
                raise ValueError(f"environment sets {variable}, which Slurm or the job script sets")
        if self.memory_per_gpu and self.memory_per_node:
            raise ValueError("memory_per_gpu and memory_per_node are both given, and only one applies")
        if self.gpus_per_node and self.cpus_per_node:
            raise ValueError("cpus_per_node is for nodes without GPUs; write cpus_per_gpu")
        if self.container and self.programs:
            raise ValueError("programs and container are both given, and a container brings its own programs")
        if self.longest_time and seconds_of(self.time) > seconds_of(self.longest_time):
            raise ValueError(f"time is {self.time}, more than longest_time {self.longest_time}")
        return self


def seconds_of(duration: str) -> int:
    """Return the seconds of `24:00:00` or `1-00:00:00`."""
    match = DURATION.fullmatch(duration)
    assert match is not None, "durations are checked when they are read"
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def mebibytes_of(memory: str) -> int:
    """Return the MiB of `64G`, rounded up."""
    return -(-int(memory[:-1]) * SCALES[memory[-1]] // 2**20)
