"""Explain why Slurm refuses a job, with the values that the site allows; find jobs that it would never start."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from packhorse.errors import UserError
from packhorse.launching.slurm.client import SlurmClient, SlurmError
from packhorse.launching.slurm.script import JobRequest
from packhorse.launching.slurm.site import SiteProfile, limit_seconds, seconds_of

GPUS_OF_NODE = re.compile(r"gpu(?::([^:,(]+))??:(\d+)")
NOT_UP: Final = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "MAINT", "NOT_RESPONDING", "POWERED_DOWN"}
FactAndFix = tuple[str, str]
"""Fact and fix of a message; Slurm's own output is the why."""


def explain_refusal(error: SlurmError, site: SiteProfile, request: JobRequest) -> UserError:
    """Return Slurm's refusal as a message that names the field, and the values that it accepts."""
    for text, explain in EXPLANATIONS.items():
        if text in error.output.lower():
            fact, fix = explain(SlurmClient(), site, request)
            return UserError(fact, f"Slurm reports: {error.output}.", fix)
    return UserError(
        f"Slurm refuses the job {request.name}.",
        f"it reports: {error.output}.",
        "see the #SBATCH lines with --dry-run, and change the site profile.",
    )


def find_excess(site: SiteProfile, request: JobRequest) -> UserError | None:
    """Find more nodes or time than the partition has: without EnforcePartLimits Slurm accepts such a job.

    Returns:
        The error; None if nothing is wrong, or nothing is known.

    Raises:
        NoSlurmError: There is no Slurm here.
        SlurmError: Slurm does not answer.
    """
    partitions = _partitions_of(SlurmClient(), request)
    if not partitions:
        return None  # sbatch --test-only reports an unknown partition
    names = " or ".join(partition["PartitionName"] for partition in partitions)
    why = "Slurm would accept the job and never start it."
    most_nodes = max(int(partition.get("TotalNodes", "0")) for partition in partitions)
    if request.num_nodes > most_nodes:
        others = [each["PartitionName"] for each in SlurmClient().partitions() if each not in partitions]
        return UserError(
            f"the job requests {request.num_nodes} nodes, and partition {names} has {most_nodes}.",
            why,
            f"set --nodes to {most_nodes} or less, or partition to {', '.join(others) or 'another'}.",
        )
    limits = [limit_seconds(partition.get("MaxTime", "UNLIMITED")) for partition in partitions]
    # A QOS may lift the partition's limit (Flags=PartitionTimeLimit).
    if request.qos is None and None not in limits:
        longest = max(limit for limit in limits if limit is not None)
        if seconds_of(request.time) > longest:
            return UserError(
                f"the job requests {request.time}, and partition {names} allows {_hours(longest)}.",
                why,
                f"set --time to {_hours(longest)} or less: a longer run resumes in the next job."
                if request.signal_seconds is not None
                else f"set cpu_jobs.time of {site.name} to {_hours(longest)} or less, or change cpu_jobs.partition.",
            )
    return None


def unavailable_nodes(error: SlurmError, request: JobRequest) -> str:
    """Describe nodes that are down or drained, for which `--test-only` refuses a job that `sbatch` would queue.

    Returns:
        How many of the fitting nodes are unavailable; empty if the refusal has another cause.
    """
    if "node configuration" not in error.output.lower():
        return ""
    fitting = [node for node in _nodes_of(SlurmClient(), request) if _fits(node, request)]
    up = [node for node in fitting if not set(re.split(r"[+*~#!%$@^-]", node.get("State", ""))) & NOT_UP]
    if not len(up) < request.num_nodes <= len(fitting):
        return ""
    return f"{len(fitting) - len(up)} of the {len(fitting)} nodes that fit it are down or drained"


def gpus_of(node: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return type (empty without one) and number of a node's GPUs, from `Gres` of `scontrol show node`."""
    return [(kind, int(count)) for kind, count in GPUS_OF_NODE.findall(node.get("Gres", ""))]


def features_of(nodes: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of all features of nodes."""
    names = {name for node in nodes for name in node.get("AvailableFeatures", "").split(",")}
    return sorted(names - {"", "(null)"})


def _fits(node: Mapping[str, str], request: JobRequest) -> bool:
    return (
        sum(count for _, count in gpus_of(node)) >= request.gpus_per_node
        and int(node.get("CPUTot", "0")) >= (request.cpus_per_node or 1)
        and int(node.get("RealMemory", "0")) >= (request.memory_mib or 1)
        and (not request.constraint or request.constraint in node.get("AvailableFeatures", "").split(","))
    )


def _explain_partition(slurm: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    names = [partition["PartitionName"] for partition in slurm.partitions() if partition.get("State") == "UP"]
    return f"partition is {request.partition or 'not set'}.", _set_to_one_of("partition", site, names)


def _explain_account(slurm: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    names = sorted({account for account, _, _ in slurm.associations()})
    allowed = [partition.get("AllowAccounts", "ALL") for partition in _partitions_of(slurm, request)]
    is_open = not allowed or "ALL" in allowed or (site.account and site.account in ",".join(allowed).split(","))
    closed = "" if is_open else f", and partition {request.partition} is for {', '.join(allowed)}"
    return f"account is {site.account or 'not set'}{closed}.", _set_to_one_of("account", site, names)


def _explain_qos(slurm: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    names = sorted({qos for _, _, allowed in slurm.associations() for qos in allowed if qos})
    return f"qos is {request.qos or 'not set'}.", _set_to_one_of("qos", site, names)


def _set_to_one_of(field: str, site: SiteProfile, names: Sequence[str]) -> str:
    return f"set {field} of {site.name} to one of {', '.join(names)}." if names else f"remove {field} from {site.name}."


def _explain_size(slurm: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    """Explain a request for more than any node has, or for a type of GPU that none has."""
    nodes = _nodes_of(slurm, request)
    if not nodes:
        return f"partition {request.partition} has no nodes for the job.", f"see `sinfo`, and change {site.name}."
    gpus = max((sum(count for _, count in gpus_of(node)) for node in nodes), default=0)
    kinds = sorted({kind for node in nodes for kind, _ in gpus_of(node) if kind})
    cpus = max(int(node.get("CPUTot", "0")) for node in nodes)
    memory = max(int(node.get("RealMemory", "0")) for node in nodes)
    where = "of this partition" if request.partition else "here"
    if request.gpus_per_node > gpus:
        fix = f"set --gpus-per-node, or gpus_per_node of {site.name}, to {gpus} or less."
        return f"the job requests {request.gpus_per_node} GPUs per node, and the largest node {where} has {gpus}.", fix
    if request.gpus_per_node and site.gpu_type and kinds and site.gpu_type not in kinds:
        return f"gpu_type is {site.gpu_type}.", _set_to_one_of("gpu_type", site, kinds)
    if request.cpus_per_node and request.cpus_per_node > cpus:
        fix = f"lower cpus_per_gpu (cpus_per_node, cpu_jobs.cpus) of {site.name} until it is {cpus} or less."
        return f"the job requests {request.cpus_per_node} CPUs per node, and the largest node {where} has {cpus}.", fix
    if request.memory_mib and request.memory_mib > memory:
        fix = f"lower memory_per_gpu (memory_per_node, cpu_jobs.memory) of {site.name} until it is {memory}M or less."
        return f"the job requests {request.memory_mib:,} MiB per node, and the largest {where} has {memory:,} MiB.", fix
    size = f"{request.num_nodes} nodes, {request.gpus_per_node} GPUs per node"
    fix = f"request less (--nodes, --gpus-per-node), or change constraint and options of {site.name}."
    return f"the {len(nodes)} nodes {where} do not fit the job: {size}.", fix


def _explain_time(slurm: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    limits = [f"{each['PartitionName']} {each.get('MaxTime', '')}" for each in _partitions_of(slurm, request)]
    return f"the job requests {request.time}.", f"lower --time, or time of {site.name}; limits: {', '.join(limits)}."


def _explain_features(slurm: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    features = ", ".join(features_of(slurm.nodes()))
    fix = f"set constraint of {site.name} to features of the nodes: {features}."
    return f"constraint is {request.constraint or 'not set'}.", (
        fix if features else f"remove constraint from {site.name}: no node has features."
    )


def _explain_options(_: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    return f"options is {', '.join(request.options) or 'empty'}.", f"change options of {site.name}."


def _explain_policy(_: SlurmClient, site: SiteProfile, request: JobRequest) -> FactAndFix:
    names = f"account {site.account or 'default'}, qos {request.qos or 'default'}"
    size = f"{request.num_nodes} nodes for {request.time}, {names}"
    fix = "request less, wait until an earlier job ends, or set another qos; `sacctmgr show qos` lists the limits."
    return f"the job exceeds what you may use at once: {size}.", fix


EXPLANATIONS: Final[dict[str, Callable[[SlurmClient, SiteProfile, JobRequest], FactAndFix]]] = {
    "invalid partition": _explain_partition,
    "invalid account": _explain_account,
    "not permitted to use this partition": _explain_account,
    "invalid qos": _explain_qos,
    "invalid --time": _explain_time,
    "time limit is invalid": _explain_time,
    "memory specification": _explain_size,
    "invalid gres": _explain_size,
    "invalid generic resource": _explain_size,
    "invalid feature": _explain_features,
    "reservation": _explain_options,
    "license": _explain_options,
    "accounting/qos policy": _explain_policy,
    "node configuration": _explain_size,
    "node count": _explain_size,
    "more processors requested": _explain_size,
}
"""Parts of sbatch's error messages (slurm/src/common/slurm_errno.c), in lower case."""


def _partitions_of(slurm: SlurmClient, request: JobRequest) -> list[dict[str, str]]:
    """Return the requested partitions, or the site's default."""
    partitions = slurm.partitions()
    if request.partition is None:
        return [partition for partition in partitions if partition.get("Default") == "YES"]
    return [partition for partition in partitions if partition["PartitionName"] in request.partition.split(",")]


def _nodes_of(slurm: SlurmClient, request: JobRequest) -> list[dict[str, str]]:
    names = {partition["PartitionName"] for partition in _partitions_of(slurm, request)}
    return [node for node in slurm.nodes() if names & set(node.get("Partitions", "").split(","))]


def _hours(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    if hours < 100:
        return f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
    return f"{hours // 24}-{hours % 24:02}:{rest // 60:02}:{rest % 60:02}"
