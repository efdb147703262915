"""Site profile: what a cluster is like, written once and given with `--site`; docs/slurm.md lists the fields.

Values are written into `#SBATCH` lines, where a space would make Slurm ignore every later line, so each field has a
strict pattern.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from packhorse.errors import UserError
from packhorse.recipe.shipped import shipped_folder
from packhorse.yaml_source.environment import secret_mistakes
from packhorse.yaml_source.findings import Finding, file_and_line, place, rule_error, schema_findings
from packhorse.yaml_source.nodes import FileKind, KeyPath, plain, read_yaml, shown_path
from packhorse.yaml_source.schema import Name, SchemaView, Section

SITE_FILE: Final = "site.yaml"
"""Profile that is used if `--site` is not given."""
PROFILE_FILE: Final = FileKind("a site profile", "partition: gpu", "write a first one with `packhorse site`")
WHO_READS_A_PROFILE: Final = "the profile is copied into job scripts, which all users of the cluster may read."
TEXT: Final = r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$"
REFERENCE: Final = r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}"
DURATION = re.compile(r"(?:\d+-)?\d{1,2}:[0-5]\d:[0-5]\d")
LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
SCALES: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Units of memory in Slurm: KiB, MiB, GiB, TiB."""
VARIABLE_WORDS: Final = "names of variables: letters, digits and `_`, no digit first"


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
        "an absolute path without spaces; ${env:NAME} refers to a variable of the job",
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
"""Prefixes of the variables that Slurm or the job script sets."""
TAKEN: Final = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gres", "cpus-per-task", "mem", "time", "signal",
    "requeue", "no-requeue", "open-mode", "output", "error", "account", "partition", "qos", "constraint", "mail-user",
    "mail-type", "dependency", "array", "wrap", "parsable", "test-only", "chdir", "gpus", "ntasks-per-gpu",
    "kill-on-invalid-dep", "input", "export",
)  # fmt: skip
"""Options that have a field of the profile, or that the job script sets."""


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
    def _check_rules(self) -> SiteProfile:
        for finding in _broken_rules(self):
            raise rule_error(finding)
        return self


def load_site(name_or_path: str | None) -> SiteProfile:
    """Load a profile.

    Args:
        name_or_path: A YAML file, or the name of a shipped profile; None for `site.yaml` in the current folder.

    Raises:
        UserError: There is no such profile, or it has mistakes; all are reported at once.
    """
    path = _locate(name_or_path)
    root, mistakes = read_yaml(path, shown_path(path), PROFILE_FILE)
    profile = None
    try:
        profile = SiteProfile.model_validate(plain(root))
    except ValidationError as error:
        view = SchemaView(SiteProfile, "a site profile", key_words=VARIABLE_WORDS)
        mistakes += [place(finding, root) for finding in schema_findings(error, root, view)]
    mistakes += secret_mistakes(root, WHO_READS_A_PROFILE)
    if mistakes or profile is None:
        raise UserError.of(sorted(dict.fromkeys(mistakes), key=file_and_line))
    return profile


def shipped_sites() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in (shipped_folder("slurm") / "sites").glob("*.yaml"))


def _locate(name_or_path: str | None) -> Path:
    path = Path(name_or_path or SITE_FILE)
    if path.is_file():
        return path
    shipped = shipped_folder("slurm") / "sites" / f"{path.name.removesuffix('.yaml')}.yaml"
    if name_or_path and path.name == name_or_path and shipped.is_file():
        return shipped
    if not name_or_path:
        raise UserError(
            f"there is no {SITE_FILE} in this folder, and --site is not given.",
            "the profile says how to request jobs on this cluster: partition, account, GPUs per node.",
            "write a first one with `packhorse site`, read it, and try again.",
        )
    close = difflib.get_close_matches(path.stem, shipped_sites(), n=1)
    raise UserError(
        f"there is no file {name_or_path}, and no shipped profile of that name.",
        f"the shipped profiles are {', '.join(shipped_sites())}.",
        f"write --site {close[0]}." if close else "give the path of a profile; `packhorse site` writes one.",
    )


def _broken_rules(site: SiteProfile) -> Iterator[Finding]:
    """Yield conflicts between the fields of a profile."""

    def refuse(fact: str, why: str, fix: str, *paths: KeyPath) -> Finding:
        return Finding(paths, f"{fact}.", f"{why}.", fix)

    for index, option in enumerate(site.options):
        if option.removeprefix("--").partition("=")[0] in TAKEN:
            why = "this option has its own field, or the job script sets it"
            fix = f"remove {option}, and use the field of the profile if there is one"
            yield refuse(f"options contains {option}", why, fix, ("options", index))
    for variable in site.environment:
        if variable.startswith(OURS):
            fact, why = f"environment sets {variable}", "Slurm or the job script sets this variable"
            yield refuse(fact, why, f"remove {variable}", ("environment", variable))
    if site.memory_per_gpu and site.memory_per_node:
        fact, why = "memory_per_gpu and memory_per_node are both given", "each of them sets the memory of a job"
        yield refuse(fact, why, "remove one of them", ("memory_per_gpu",), ("memory_per_node",))
    if site.gpus_per_node and site.cpus_per_node:
        fact = f"cpus_per_node is given, and gpus_per_node is {site.gpus_per_node}"
        why = "cpus_per_node is for nodes without GPUs"
        yield refuse(fact, why, "use cpus_per_gpu, or set gpus_per_node to 0", ("cpus_per_node",))
    if site.container and site.programs:
        fact, why = "programs and container are both given", "a container contains its own programs"
        yield refuse(fact, why, "remove one of them", ("programs",), ("container",))
    if site.longest_time and seconds_of(site.time) > seconds_of(site.longest_time):
        fact = f"time is {site.time}, more than longest_time {site.longest_time}"
        fix = f"set time to {site.longest_time} or less"
        yield refuse(fact, "Slurm would refuse every job", fix, ("time",), ("longest_time",))


def seconds_of(duration: str) -> int:
    """Return the seconds of a duration of a profile, such as `24:00:00` or `1-00:00:00`."""
    seconds = limit_seconds(duration)
    assert seconds is not None, "durations are checked when they are read"
    return seconds


def limit_seconds(limit: str) -> int | None:
    """Return the seconds of a time limit as Slurm reports it, such as `1-00:00:00` or `30:00`; None for no limit."""
    match = LIMIT.fullmatch(limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def mebibytes_of(memory: str) -> int:
    """Return the MiB of a memory size such as `64G`, rounded up."""
    return -(-int(memory[:-1]) * SCALES[memory[-1]] // 2**20)
