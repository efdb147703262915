"""A first site profile from what Slurm reports of partitions, nodes and accounts; each line names its source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packhorse.errors import UserError
from packhorse.launching.slurm.client import SlurmClient
from packhorse.launching.slurm.refusals import features_of, gpus_of
from packhorse.launching.slurm.site import limit_seconds

Record = Mapping[str, str]
COMMENT_COLUMN = 34
MAX_PREPARE_CPUS = 8
"""CPUs of a job that prepares data; less if the nodes have fewer."""
PREPARE_HOURS = 4
"""Time limit of such a job; less if the partition allows less."""
NO_TYPE = ("", "gpu", "no_consume")


@dataclass(frozen=True)
class ProfileLine:
    """One line of the profile.

    Attributes:
        key: Name of the field.
        value: Value as YAML; if empty, the field is commented out, to be filled in.
        comment: Meaning and source.
        example: Example that replaces an empty value.
    """

    key: str
    value: str
    comment: str
    example: str = ""

    def __str__(self) -> str:
        field = f"{self.key}: {self.value}" if self.value else f"# {self.key}: {self.example}"
        return f"{field:<{COMMENT_COLUMN - 1}} # {self.comment}"


def probe_site(name: str, partition: str) -> str:
    """Query Slurm, and return a profile as text.

    Args:
        name: Name of the profile; empty for the name of the partition.
        partition: Partition for training; empty for the site's default if its nodes have GPUs, else the first partition
            with GPUs, else the default.

    Raises:
        NoSlurmError: There is no Slurm here.
        UserError: There is no such partition, or it has no nodes.
    """
    slurm = SlurmClient()
    partitions, all_nodes = slurm.partitions(), slurm.nodes()
    chosen = _choose_partition(partitions, all_nodes, partition)
    nodes = _nodes_of(chosen, all_nodes)
    if not nodes:
        raise UserError(
            f"partition {chosen['PartitionName']} has no nodes.",
            "a profile describes the nodes of a partition.",
            f"give another --partition: {', '.join(each['PartitionName'] for each in partitions)}.",
        )
    gpus = [gpus_of(node) for node in nodes]
    gpus_per_node = _most_common([sum(count for _, count in types) for types in gpus])
    lines = [
        ProfileLine("name", _as_yaml(name or chosen["PartitionName"]), "name of the profile in messages"),
        *_account_lines(chosen, slurm.associations()),
        *_gpu_lines(gpus, gpus_per_node),
        *_share_lines(nodes, gpus_per_node),
        *_time_lines(chosen),
        _cpu_jobs_line(partitions, all_nodes, chosen, gpus_per_node),
        *_optional_lines(nodes),
    ]
    head = [
        f"# A first profile, from what Slurm reports of partition {chosen['PartitionName']} ({len(nodes)} nodes).",
        "# Read each line; what Slurm cannot know is commented out. Then: packhorse submit RECIPE --dry-run",
    ]
    return "\n".join([*head, *map(str, lines)]) + "\n"


def _choose_partition(partitions: Sequence[Record], all_nodes: Sequence[Record], name: str) -> Record:
    if name:
        named = next((partition for partition in partitions if partition["PartitionName"] == name), None)
        if named is None:
            raise UserError(
                f"there is no partition {name!a} here.",
                "a profile describes the nodes of a partition.",
                f"give one of {', '.join(partition['PartitionName'] for partition in partitions)}.",
            )
        return named
    if not partitions:
        raise UserError(
            "Slurm reports no partition.", "a job runs in a partition.", "ask your administrators which you may use."
        )
    default_first = sorted(partitions, key=lambda partition: partition.get("Default") != "YES")
    with_gpus = [each for each in default_first if any(gpus_of(node) for node in _nodes_of(each, all_nodes))]
    return (with_gpus or default_first)[0]


def _nodes_of(partition: Record, all_nodes: Sequence[Record]) -> list[Record]:
    return [node for node in all_nodes if partition["PartitionName"] in node.get("Partitions", "").split(",")]


def _account_lines(chosen: Record, associations: Sequence[tuple[str, str, tuple[str, ...]]]) -> list[ProfileLine]:
    accounts = sorted({account for account, _, _ in associations})
    allowed = chosen.get("AllowAccounts", "ALL").split(",")
    fitting = [account for account in accounts if account in allowed or "ALL" in allowed]
    qos = sorted({name for _, _, names in associations for name in names if name})
    # A user with several accounts has a default account, which applies if the profile names none.
    only = _as_yaml(fitting[0]) if len(fitting) == 1 else ""
    yours = f"yours: {', '.join(accounts)}" if accounts else "this site has no accounts, or shows you none"
    qos_words = f"you may set {', '.join(qos)}" if qos else "if the site has several"
    nodes = f"{chosen.get('State', '')}, nodes {chosen.get('Nodes', '')}"
    return [
        ProfileLine("account", only, f"account to charge; {yours} (sacctmgr)", fitting[0] if fitting else "my-account"),
        ProfileLine("partition", _as_yaml(chosen["PartitionName"]), nodes),
        ProfileLine("qos", "", f"quality of service; {qos_words}", qos[0] if qos else "normal"),
    ]


def _gpu_lines(gpus: Sequence[Sequence[tuple[str, int]]], gpus_per_node: int) -> list[ProfileLine]:
    kinds = sorted({kind for types in gpus for kind, _ in types if kind not in NO_TYPE})
    counts = sorted({sum(count for _, count in types) for types in gpus})
    differ = f"; nodes have {', '.join(map(str, counts))}" if len(counts) > 1 else ""
    lines = [ProfileLine("gpus_per_node", str(gpus_per_node), f"Gres of the nodes{differ}")]
    if gpus_per_node:
        only = _as_yaml(kinds[0]) if len(kinds) == 1 else ""
        types = f"types of the nodes: {', '.join(kinds)}" if kinds else "the nodes report no type"
        lines += [
            ProfileLine("gpu_type", only, types, kinds[0] if kinds else "h100"),
            ProfileLine("gpus_asked_by", "", "if your site requires --gres=gpu:N", "gres"),
            ProfileLine("gpu", "", "for the memory check; names: packhorse plan RECIPE --gpus auto", "H100-80GB"),
            ProfileLine("network_gbit", "", "per GPU between nodes, for the speed estimate", "400"),
        ]
    return lines


def _share_lines(nodes: Sequence[Record], gpus_per_node: int) -> list[ProfileLine]:
    cpus = min(int(node.get("CPUTot", "1")) for node in nodes)
    memory = min(int(node.get("RealMemory", "1")) for node in nodes)
    if not gpus_per_node:
        return [
            ProfileLine("cpus_per_node", str(cpus), f"all {cpus} CPUs of a node"),
            ProfileLine("memory_per_node", "", f"a node has {memory:,} MiB", f"{memory}M"),
        ]
    # RealMemory includes the system's own part of a node's memory; a job that requests all of it may never start.
    share = f"{max(1, memory * 95 // 100 // gpus_per_node)}M"
    return [
        ProfileLine("cpus_per_gpu", str(max(1, cpus // gpus_per_node)), f"{cpus} CPUs per node, {gpus_per_node} GPUs"),
        ProfileLine("memory_per_gpu", share, f"95 % of a node's {memory:,} MiB, divided by its GPUs"),
    ]


def _time_lines(chosen: Record) -> list[ProfileLine]:
    longest = chosen.get("MaxTime", "UNLIMITED")
    maximum = json.dumps(longest) if limit_seconds(longest) is not None else ""
    return [
        ProfileLine(
            "time", json.dumps(_at_most(24, longest)), "of one job; a longer run resumes in the next job automatically"
        ),
        ProfileLine("longest_time", maximum, "MaxTime of the partition", '"48:00:00"'),
        ProfileLine("requeue", "", "if the site forbids requeue: a second job resumes the run", "false"),
    ]


def _cpu_jobs_line(
    partitions: Sequence[Record], all_nodes: Sequence[Record], chosen: Record, gpus_per_node: int
) -> ProfileLine:
    """Return the line for jobs that prepare data: in a partition without GPUs if there is one."""
    without_gpus = [
        (partition, nodes)
        for partition in partitions
        if "ALL" in partition.get("AllowAccounts", "ALL")
        and (nodes := _nodes_of(partition, all_nodes))
        and not any(map(gpus_of, nodes))
    ]
    use_other = without_gpus and gpus_per_node
    partition, nodes = without_gpus[0] if use_other else (chosen, _nodes_of(chosen, all_nodes))
    cpus = min(MAX_PREPARE_CPUS, *(int(node.get("CPUTot", "1")) for node in nodes))
    time = _at_most(PREPARE_HOURS, partition.get("MaxTime", "UNLIMITED"))
    fields = f"cpus: {cpus}, time: {json.dumps(time)}"
    if partition is chosen:
        return ProfileLine("cpu_jobs", f"{{{fields}}}", "jobs that prepare data, in the same partition")
    name = _as_yaml(partition["PartitionName"])
    return ProfileLine("cpu_jobs", f"{{partition: {name}, {fields}}}", "jobs that prepare data, without GPUs")


def _optional_lines(nodes: Sequence[Record]) -> list[ProfileLine]:
    features = features_of(nodes)
    comment = f"features of the nodes: {', '.join(features)}" if features else "the nodes report no features"
    return [
        ProfileLine("constraint", "", comment, features[0] if features else "a100"),
        ProfileLine("modules", "", "`module avail` lists them", "[cuda/12.8]"),
        ProfileLine(
            "container", "", "prefix of each command on a node", "[apptainer, exec, --nv, /shared/packhorse.sif]"
        ),
        ProfileLine("environment", "", "environment variables; never a secret", "{NCCL_IB_HCA: mlx5}"),
        ProfileLine("network_interface", "", "if NCCL selects a wrong one; `ip -br link` on a node lists them", "ib0"),
        ProfileLine("scratch", "", "a fast local folder of each node", "${env:TMPDIR}"),
        ProfileLine("shared", "", "folders that every node mounts; a run elsewhere is refused", "[/home, /work]"),
        ProfileLine("mail", "", "address for Slurm's mail when a job ends or fails", "me@example.org"),
    ]


def _at_most(hours: int, limit: str) -> str:
    """Return this number of hours, or the limit of a partition if it is less."""
    seconds = limit_seconds(limit)
    return f"{hours:02}:00:00" if seconds is None or seconds >= hours * 3600 else limit


def _most_common(counts: Sequence[int]) -> int:
    return Counter(counts).most_common(1)[0][0]


def _as_yaml(text: str) -> str:
    """Return text as YAML, quoted if it would be read as another type."""
    return text if text[:1].isalpha() and text.lower() not in ("true", "false", "null") else json.dumps(text)
