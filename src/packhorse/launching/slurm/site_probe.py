"""A first site profile, from what Slurm says of its partitions, nodes and accounts; each line says where it is from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packhorse.errors import UserError
from packhorse.launching.slurm.client import associations, nodes, partitions
from packhorse.launching.slurm.refusals import gpus_of

Record = Mapping[str, str]
COMMENT_COLUMN = 34
MOST_CPUS = 8
"""Of a job that prepares data, where nodes have more."""
USUAL_HOURS = 4
"""Of such a job, where the partition gives more."""
NO_TYPE = ("", "gpu", "no_consume")


@dataclass(frozen=True)
class Line:
    """A line of the profile.

    Attributes:
        key: Its field; empty for a line that is a comment alone.
        value: As YAML; empty: the field is shown as a comment, to fill in.
        comment: What it means, and where it is from.
        example: What stands in the comment where there is no value.
    """

    key: str
    value: str
    comment: str
    example: str = ""

    def __str__(self) -> str:
        written = f"{self.key}: {self.value}" if self.value else f"# {self.key}: {self.example}"
        return f"{written:<{COMMENT_COLUMN - 1}} # {self.comment}"


def probe_site(name: str, partition: str) -> str:
    """Asks Slurm, and writes a profile as text.

    Args:
        name: What the profile is called; empty takes that of the partition.
        partition: Of the nodes to train on; empty takes the site's default if its nodes have GPUs, else the first
            whose nodes have, else the default.

    Raises:
        NoSlurmError: There is no Slurm here.
        UserError: There is no such partition, or it has no nodes.
    """
    every, machines = partitions(), nodes()
    chosen = _chosen(every, machines, partition)
    own = _nodes_of(chosen, machines)
    if not own:
        raise UserError(
            f"partition {chosen['PartitionName']} has no nodes.",
            "a profile says what a node has.",
            f"name another with --partition: {', '.join(each['PartitionName'] for each in every)}.",
        )
    gpus = [gpus_of(node) for node in own]
    count = _most_common([sum(number for _, number in each) for each in gpus])
    lines = [
        Line("name", _plain(name or chosen["PartitionName"]), "what the profile is called in messages"),
        *_who(chosen),
        *_gpus(gpus, count),
        *_shares(own, count),
        *_times(chosen),
        *_jobs_without_gpus(every, machines, chosen, count),
        *_left_to_you(own),
    ]
    head = [
        f"# A first profile, from what Slurm says of partition {chosen['PartitionName']} ({len(own)} nodes).",
        "# Read each line; what Slurm cannot know is commented out. Then: packhorse submit RECIPE --dry-run",
    ]
    return "\n".join([*head, *map(str, lines)]) + "\n"


def _chosen(every: Sequence[Record], machines: Sequence[Record], partition: str) -> Record:
    names = [each["PartitionName"] for each in every]
    if partition:
        found = next((each for each in every if each["PartitionName"] == partition), None)
        if found is None:
            raise UserError(
                f"there is no partition {partition!a} here.",
                "a profile is made from the nodes of one.",
                f"name one of {', '.join(names)}.",
            )
        return found
    if not every:
        raise UserError("Slurm shows no partition.", "jobs run in one.", "ask your administrators which you may use.")
    by_default = sorted(every, key=lambda each: each.get("Default") != "YES")
    with_gpus = [each for each in by_default if any(gpus_of(node) for node in _nodes_of(each, machines))]
    return (with_gpus or by_default)[0]


def _nodes_of(partition: Record, machines: Sequence[Record]) -> list[Record]:
    return [node for node in machines if partition["PartitionName"] in node.get("Partitions", "").split(",")]


def _who(chosen: Record) -> list[Line]:
    owned = associations()
    accounts = sorted({account for account, _, _ in owned})
    allowed = chosen.get("AllowAccounts", "ALL").split(",")
    fitting = [each for each in accounts if each in allowed or "ALL" in allowed]
    qualities = sorted({quality for _, _, names in owned for quality in names if quality})
    only = _plain(fitting[0]) if len(fitting) == 1 else ""
    yours = f"yours: {', '.join(accounts)}" if accounts else "this site keeps no accounts, or shows you none"
    said = f"you may name {', '.join(qualities)}" if qualities else "where the site has several"
    return [
        # Of several the user has a default, which counts where none is named.
        Line("account", only, f"who is charged; {yours} (sacctmgr)", fitting[0] if fitting else "my-account"),
        Line("partition", _plain(chosen["PartitionName"]), f"{chosen.get('State', '')}, of {chosen.get('Nodes', '')}"),
        Line("qos", "", f"quality of service; {said}", qualities[0] if qualities else "normal"),
    ]


def _gpus(gpus: Sequence[Sequence[tuple[str, int]]], count: int) -> list[Line]:
    kinds = sorted({kind for each in gpus for kind, _ in each if kind not in NO_TYPE})
    counts = sorted({sum(number for _, number in each) for each in gpus})
    differ = f"; nodes have {', '.join(map(str, counts))}" if len(counts) > 1 else ""
    lines = [Line("gpus_per_node", str(count), f"Gres of the nodes{differ}")]
    if count:
        only = _plain(kinds[0]) if len(kinds) == 1 else ""
        named = f"of these types: {', '.join(kinds)}" if kinds else "the nodes name no type"
        lines.append(Line("gpu_type", only, named, kinds[0] if kinds else "h100"))
        lines.append(Line("gpus_asked_by", "", "the other way, if your site wants --gres=gpu:N", "gres"))
        lines.append(Line("gpu", "", "for the memory check; names: packhorse plan RECIPE --gpus auto", "H100-80GB"))
        lines.append(Line("network_gbit", "", "of one GPU between nodes, for the time the plan expects", "400"))
    return lines


def _shares(own: Sequence[Record], count: int) -> list[Line]:
    cpus = min(int(node.get("CPUTot", "1")) for node in own)
    memory = min(int(node.get("RealMemory", "1")) for node in own)
    if not count:
        return [
            Line("cpus_per_node", str(cpus), f"all {cpus} of a node"),
            Line("memory_per_node", "", f"a node has {memory:,} MiB", f"{memory}M"),
        ]
    return [
        Line("cpus_per_gpu", str(max(1, cpus // count)), f"{cpus} CPUs of a node, shared by its {count} GPUs"),
        # Slurm counts the system's own part of a node's memory in; a job of all of it may find none free.
        Line("memory_per_gpu", f"{max(1, memory * 95 // 100 // count)}M", f"95 % of a node's {memory:,} MiB, shared"),
    ]


def _times(chosen: Record) -> list[Line]:
    longest = chosen.get("MaxTime", "UNLIMITED")
    limited = _is_limit(longest)
    time = longest if limited and _hours(longest) < 24 else "24:00:00"
    return [
        Line("time", json.dumps(time), "of one job; a run that takes longer goes on in the next by itself"),
        Line("longest_time", json.dumps(longest) if limited else "", "MaxTime of the partition", '"48:00:00"'),
        Line("requeue", "", "if jobs may not be queued again here: another job goes on", "false"),
    ]


def _jobs_without_gpus(every: Sequence[Record], machines: Sequence[Record], chosen: Record, count: int) -> list[Line]:
    """Where data is prepared; nodes without GPUs are their own."""
    without = [
        (each, found)
        for each in every
        if "ALL" in each.get("AllowAccounts", "ALL")
        and (found := _nodes_of(each, machines))
        and not any(map(gpus_of, found))
    ]
    partition, own = without[0] if without and count else (chosen, _nodes_of(chosen, machines))
    cpus = min(MOST_CPUS, *(int(node.get("CPUTot", "1")) for node in own))
    longest = partition.get("MaxTime", "UNLIMITED")
    time = longest if _is_limit(longest) and _hours(longest) < USUAL_HOURS else "04:00:00"
    words = [f"cpus: {cpus}", f"time: {json.dumps(time)}"]
    if partition is chosen:
        return [Line("cpu_jobs", f"{{{', '.join(words)}}}", "data is prepared by such a job, in the same partition")]
    named = [f"partition: {_plain(partition['PartitionName'])}", *words]
    return [Line("cpu_jobs", f"{{{', '.join(named)}}}", "data is prepared there: no GPUs")]


def _left_to_you(own: Sequence[Record]) -> list[Line]:
    features = sorted({name for node in own for name in node.get("AvailableFeatures", "").split(",")} - {"", "(null)"})
    has = f"features of the nodes: {', '.join(features)}" if features else "the nodes name no features"
    return [
        Line("constraint", "", has, features[0] if features else "a100"),
        Line("modules", "", "`module avail` shows them", "[cuda/12.8]"),
        Line("container", "", "words before each command on a node", "[apptainer, exec, --nv, /shared/packhorse.sif]"),
        Line("environment", "", "variables to set; never a secret", "{NCCL_IB_HCA: mlx5}"),
        Line("network_interface", "", "if NCCL takes the wrong one; `ip -br link` on a node shows them", "ib0"),
        Line("scratch", "", "a fast folder of each node's own", "${env:TMPDIR}"),
        Line("shared", "", "folders that every node sees; a run elsewhere is then refused", "[/home, /work]"),
        Line("mail", "", "where Slurm writes to when a job ends or fails", "me@example.org"),
    ]


def _is_limit(time: str) -> bool:
    return time.replace("-", "").replace(":", "").isdigit()


def _hours(limit: str) -> float:
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    return int(days or 0) * 24 + (parts[0] if len(parts) == 3 else 0)


def _most_common(counts: Sequence[int]) -> int:
    return Counter(counts).most_common(1)[0][0]


def _plain(text: str) -> str:
    """As YAML: quoted where it would be read as something else."""
    return text if text[:1].isalpha() and text.lower() not in ("true", "false", "null") else json.dumps(text)
