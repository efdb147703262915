"""Why Slurm refuses a job, in the user's words and with what the site allows; and what it takes and never starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from packhorse.errors import UserError
from packhorse.launching.slurm.client import SlurmError, associations, nodes, partitions
from packhorse.launching.slurm.script import JobRequest
from packhorse.launching.slurm.site import SiteProfile, seconds_of

GPUS_OF_NODE = re.compile(r"gpu(?::([^:,(]+))??:(\d+)")
SLURM_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
NOT_UP: Final = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "MAINT", "NOT_RESPONDING", "POWERED_DOWN"}
Refused = tuple[str, str]
"""The fact, and the fix; why stands in Slurm's own words."""


def explained(error: SlurmError, site: SiteProfile, request: JobRequest) -> UserError:
    """A refusal of Slurm, with the field that it is about and the values that it takes."""
    for said, explain in EXPLANATIONS.items():
        if said in error.said.lower():
            fact, fix = explain(site, request)
            return UserError(fact, f"Slurm says: {error.said}.", fix)
    return UserError(
        f"Slurm refuses the job {request.name}.",
        f"it says: {error.said}.",
        "see the #SBATCH lines with --dry-run, and change the site profile.",
    )


def too_much(site: SiteProfile, request: JobRequest) -> UserError | None:
    """What Slurm would take and never start, unless the site has EnforcePartLimits: too many nodes, or too much time.

    None where nothing is wrong, or it cannot be known.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: It does not answer.
    """
    found = _partitions(request)
    if not found:
        return None  # sbatch --test-only says so, with its own words
    why = "Slurm would take the job, and it would wait for ever."
    most_nodes = max(int(each.get("TotalNodes", "0")) for each in found)
    if request.num_nodes > most_nodes:
        return UserError(
            f"the job asks for {request.num_nodes} nodes, and partition {_names(found)} has {most_nodes}.",
            why,
            f"set --nodes to {most_nodes} or less, or partition to {_others(found)}.",
        )
    limits = [_seconds(each.get("MaxTime", "UNLIMITED")) for each in found]
    # A QOS may lift the partition's limit (Flags=PartitionTimeLimit).
    if request.qos is None and None not in limits:
        longest = max(limit for limit in limits if limit is not None)
        if seconds_of(request.time) > longest:
            return UserError(
                f"the job asks for {request.time}, and partition {_names(found)} gives {_shown(longest)} at most.",
                why,
                f"set --time to {_shown(longest)} or less: a run that takes longer goes on in the next job."
                if request.signal_seconds is not None
                else f"set cpu_jobs.time of {site.name} to {_shown(longest)} or less, or another partition there.",
            )
    return None


def nodes_are_down(error: SlurmError, request: JobRequest) -> str:
    """Why `--test-only` refuses what `sbatch` would take: nodes that fit the job are down or drained for now.

    Returns:
        How many of how many; empty where that is not the reason.
    """
    if "node configuration" not in error.said.lower():
        return ""
    fitting = [node for node in _nodes(request) if _fits(node, request)]
    up = [node for node in fitting if not set(re.split(r"[+*~#!%$@^-]", node.get("State", ""))) & NOT_UP]
    if not len(up) < request.num_nodes <= len(fitting):
        return ""
    return f"{len(fitting) - len(up)} of the {len(fitting)} nodes that fit it are down or drained"


def _fits(node: Mapping[str, str], request: JobRequest) -> bool:
    return (
        sum(count for _, count in gpus_of(node)) >= request.gpus_per_node
        and int(node.get("CPUTot", "0")) >= (request.cpus_per_node or 1)
        and int(node.get("RealMemory", "0")) >= (request.memory_mib or 1)
        and (not request.constraint or request.constraint in node.get("AvailableFeatures", "").split(","))
    )


def allowed_accounts() -> list[str]:
    """Accounts that this user may charge; empty where the site keeps none."""
    return sorted({account for account, _, _ in associations()})


def allowed_qos() -> list[str]:
    """Qualities of service that this user may ask for; empty where the site keeps none."""
    return sorted({qos for _, _, names in associations() for qos in names if qos})


def gpus_of(node: Mapping[str, str]) -> list[tuple[str, int]]:
    """Type (empty where it has none) and number of a node's GPUs, as `Gres` of `scontrol show node` has them."""
    return [(kind, int(count)) for kind, count in GPUS_OF_NODE.findall(node.get("Gres", ""))]


def _partition(site: SiteProfile, request: JobRequest) -> Refused:
    names = [each["PartitionName"] for each in partitions() if each.get("State") == "UP"]
    asked = request.partition or "none"
    return f"partition is {asked}.", f"set partition of {site.name} to one of {', '.join(names)}."


def _account(site: SiteProfile, request: JobRequest) -> Refused:
    names = allowed_accounts()
    closed = _closed_to(site.account, request)
    fix = f"set account of {site.name} to one of {', '.join(names)}." if names else f"take account out of {site.name}."
    return f"account is {site.account or 'not set'}{closed}.", fix


def _closed_to(account: str | None, request: JobRequest) -> str:
    allowed = [each.get("AllowAccounts", "ALL") for each in _partitions(request)]
    if not allowed or "ALL" in allowed or (account and account in ",".join(allowed).split(",")):
        return ""
    return f", and partition {request.partition} is for {', '.join(allowed)}"


def _quality(site: SiteProfile, request: JobRequest) -> Refused:
    names = allowed_qos()
    fix = f"set qos of {site.name} to one of {', '.join(names)}." if names else f"take qos out of {site.name}."
    return f"qos is {request.qos or 'not set'}.", fix


def _size(site: SiteProfile, request: JobRequest) -> Refused:
    """More of something than any node has, or a kind of GPU that none has."""
    there = _nodes(request)
    if not there:
        return f"the job asks for what partition {request.partition} has not.", f"see `sinfo`, and change {site.name}."
    gpus = max((sum(count for _, count in gpus_of(node)) for node in there), default=0)
    kinds = sorted({kind for node in there for kind, _ in gpus_of(node) if kind})
    cpus = max(int(node.get("CPUTot", "0")) for node in there)
    memory = max(int(node.get("RealMemory", "0")) for node in there)
    where = "of this partition" if request.partition else "here"
    if request.gpus_per_node > gpus:
        fix = f"set --gpus-per-node, or gpus_per_node of {site.name}, to {gpus} or less."
        return f"the job asks for {request.gpus_per_node} GPUs a node, and a node {where} has {gpus} at most.", fix
    if request.gpus_per_node and site.gpu_type and kinds and site.gpu_type not in kinds:
        return f"gpu_type is {site.gpu_type}.", f"set gpu_type of {site.name} to one of {', '.join(kinds)}."
    if request.cpus_per_node and request.cpus_per_node > cpus:
        fix = f"set cpus_per_gpu (cpus_per_node, cpu_jobs.cpus) of {site.name} so that it is {cpus} or less."
        return f"the job asks for {request.cpus_per_node} CPUs a node, and a node {where} has {cpus} at most.", fix
    if request.memory_mib and request.memory_mib > memory:
        fix = f"set memory_per_gpu (memory_per_node, cpu_jobs.memory) of {site.name} so that it is {memory}M or less."
        return f"the job asks for {request.memory_mib:,} MiB a node, and a node {where} has {memory:,} at most.", fix
    asked = f"{request.num_nodes} nodes, {request.gpus_per_node} GPUs a node"
    fix = f"ask for less (--nodes, --gpus-per-node), or change constraint and options of {site.name}."
    return f"no nodes {where} fit the job: {asked}; {len(there)} are there.", fix


def _time(site: SiteProfile, request: JobRequest) -> Refused:
    limits = [f"{each['PartitionName']} {each.get('MaxTime', '')}" for each in _partitions(request)]
    return (
        f"the job asks for {request.time}.",
        f"set --time, or time of {site.name}, lower; limits: {', '.join(limits)}.",
    )


def _features(site: SiteProfile, request: JobRequest) -> Refused:
    names = {name for node in nodes() for name in node.get("AvailableFeatures", "").split(",")}
    known = ", ".join(sorted(names - {"", "(null)"}))
    fix = (
        f"set constraint of {site.name} to features of these: {known}."
        if known
        else f"no node has features: take constraint out of {site.name}."
    )
    return f"constraint is {request.constraint or 'not set'}.", fix


def _options(site: SiteProfile, request: JobRequest) -> Refused:
    return f"options holds {', '.join(request.options) or 'nothing'}.", f"change options of {site.name}."


def _policy(site: SiteProfile, request: JobRequest) -> Refused:
    names = f"account {site.account or 'default'}, qos {request.qos or 'default'}"
    asked = f"{request.num_nodes} nodes for {request.time}, {names}"
    fix = "ask for less, wait until an earlier job has ended, or name another qos; `sacctmgr show qos` has the limits."
    return f"the job is beyond what you may have at once: {asked}.", fix


EXPLANATIONS: Final[dict[str, Callable[[SiteProfile, JobRequest], Refused]]] = {
    "invalid partition": _partition,
    "invalid account": _account,
    "not permitted to use this partition": _account,
    "invalid qos": _quality,
    "invalid --time": _time,
    "time limit is invalid": _time,
    "memory specification": _size,
    "invalid gres": _size,
    "invalid generic resource": _size,
    "invalid feature": _features,
    "reservation": _options,
    "license": _options,
    "accounting/qos policy": _policy,
    "node configuration": _size,
    "node count": _size,
    "more processors requested": _size,
}
"""Parts of what sbatch says (slurm/src/common/slurm_errno.c), in lower case."""


def _partitions(request: JobRequest) -> list[dict[str, str]]:
    """Those that are named; else the site's default."""
    every = partitions()
    if request.partition is None:
        return [each for each in every if each.get("Default") == "YES"]
    return [each for each in every if each["PartitionName"] in request.partition.split(",")]


def _nodes(request: JobRequest) -> list[dict[str, str]]:
    names = {each["PartitionName"] for each in _partitions(request)}
    return [node for node in nodes() if names & set(node.get("Partitions", "").split(","))]


def _names(found: list[dict[str, str]]) -> str:
    return " or ".join(each["PartitionName"] for each in found)


def _others(found: list[dict[str, str]]) -> str:
    names = [each["PartitionName"] for each in partitions() if each not in found]
    return ", ".join(names) or "another"


def _seconds(limit: str) -> int | None:
    """`1-00:00:00`, `01:00:00` or `30:00`; None where there is no limit."""
    found = SLURM_TIME.fullmatch(limit)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _shown(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    if hours < 100:
        return f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
    return f"{hours // 24}-{hours % 24:02}:{rest // 60:02}:{rest % 60:02}"
