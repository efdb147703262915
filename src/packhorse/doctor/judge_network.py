"""Rows about names, ports, interfaces, clocks and bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packhorse.doctor.facts import NodeFacts, Question
from packhorse.doctor.interfaces import GLOO_VARIABLE, NCCL_VARIABLE
from packhorse.doctor.rows import Row

SKEW_NOTED_SECONDS: Final = 1.0
MOST_SKEW_SECONDS: Final = 30.0
"""Heartbeats, time limits and W&B compare clocks of several nodes."""
BROKEN_SHARE: Final = 0.1
"""Of a link's rate: so little is another, slower link."""
POOR_SHARE: Final = 0.5
VARIABLES: Final = {"gloo": GLOO_VARIABLE, "nccl": NCCL_VARIABLE}


def name_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Is the first node's name known everywhere, as one address?"""
    if question.num_nodes == 1:
        return None
    master = nodes[0].network.master_addr
    lost = [node for node in nodes if node.network.resolve_error]
    if lost:
        return Row(
            "name",
            "broken",
            f"{lost[0].host} does not know the name {master} of the first node: {lost[0].network.resolve_error}",
            "have the nodes' names put into DNS or /etc/hosts of all nodes, or set MASTER_ADDR to an address.",
        )
    others = dict.fromkeys(node.network.resolved for node in nodes if node.node_id != 0)
    if any(address.startswith("127.") for address in others) and not _all_met(question, nodes):
        return Row(
            "name",
            "broken",
            f"the name {master} of the first node is {', '.join(others)} on other nodes, which each has to itself",
            "have /etc/hosts of the nodes mended: no node's name may stand beside 127.0.0.1 or 127.0.1.1.",
        )
    return Row("name", "ok", f"{master} is {', '.join(others) or nodes[0].network.resolved}")


def port_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Do all nodes reach the port on which ranks meet?"""
    if question.num_nodes == 1:
        return None
    port, master = nodes[0].network.master_port, nodes[0].network.master_addr
    first = nodes[0].network.hub_error if nodes[0].node_id == 0 else ""
    name = name_row(question, nodes)
    if name is not None and name.verdict == "broken":
        return Row("port", "not tried", "the first node's name does not lead to it; see above")
    if first:
        return Row("port", "broken", first, "set MASTER_PORT to a port that is free there, for example 29511.")
    lost = [node for node in nodes if node.network.hub_error]
    if lost:
        hosts = ", ".join(node.host for node in lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        return Row(
            "port",
            "broken",
            f"{hosts} cannot reach port {port} of {master} ({lost[0].network.resolved}): {lost[0].network.hub_error}",
            "open TCP ports 20000 to 65535 between the nodes in their firewall, or set MASTER_PORT to an open one.",
        )
    return Row("port", "ok", f"{port} of {master} is reached from {_others(nodes)}")


def interface_row(question: Question, nodes: Sequence[NodeFacts]) -> Row:
    """Has every node the interface that Gloo and NCCL will take?"""
    for node in nodes:
        for choice in node.network.choices:
            # On one machine Gloo's last resort, the loopback interface, is as good as another.
            if choice.error and (question.num_nodes > 1 or not choice.address):
                return Row(
                    "interface",
                    "broken",
                    f"{node.host}: {choice.error}, so {choice.library} finds none",
                    _interface_fix(node, choice.library),
                )
    return Row("interface", "ok", "; ".join(dict.fromkeys(_taken(node) for node in nodes)))


def reach_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Does every node reach every other at the address that it will use?"""
    if question.num_nodes == 1:
        return None
    ways = sum(node.network.ways for node in nodes)
    failed = [(node, each) for node in nodes for each in node.network.failed]
    if failed:
        node, each = failed[0]
        other = next((one for one in nodes if one.node_id == each.node_id), node)
        interface = next(
            (choice.interface for choice in other.network.choices if choice.library == each.library), "its interface"
        )
        more = f" ({len(failed)} of {ways} ways fail)"
        return Row(
            "between nodes",
            "broken",
            f"{node.host} does not reach {other.host} at {each.address} ({interface}, which {each.library} takes): "
            f"{each.error}{more}",
            _interface_fix(other, each.library) + " If it is the right one, open TCP ports 20000 to 65535 on it.",
        )
    if not _all_met(question, nodes):
        return Row("between nodes", "not tried", "the nodes did not meet; see above")
    return Row("between nodes", "ok", f"each reaches each other one ({ways} ways)")


def clock_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """Do the nodes' clocks agree?"""
    if question.num_nodes == 1:
        return None
    known = [node for node in nodes if node.network.clock_skew_seconds is not None]
    if len(known) < len(nodes):
        return Row("clocks", "not tried", "the nodes did not meet; see above")
    worst = max(known, key=lambda node: abs(node.network.clock_skew_seconds or 0.0))
    seconds = worst.network.clock_skew_seconds or 0.0
    said = f"{worst.host} is {abs(seconds):.3g} s {'ahead' if seconds > 0 else 'behind'} of the first node"
    fix = "have NTP or chrony switched on at that node: heartbeats and logs of nodes are compared."
    if abs(seconds) > MOST_SKEW_SECONDS:
        return Row("clocks", "broken", said, fix)
    if abs(seconds) > SKEW_NOTED_SECONDS:
        return Row("clocks", "note", said, fix)
    return Row("clocks", "ok", f"within {abs(seconds) * 1000:.0f} ms of the first node's")


def bandwidth_row(question: Question, nodes: Sequence[NodeFacts]) -> Row | None:
    """How fast is an all-reduce, beside what the link should give?"""
    ranks = question.num_nodes * (question.gpus_per_node or 1)
    if question.fast or ranks < 2:
        return None
    asked = [(node, node.bandwidth) for node in nodes if node.bandwidth is not None]
    if not asked:
        return Row("bandwidth", "not tried", "the nodes do not reach each other; see above")
    for node, each in asked:
        if each.error:
            return Row(
                "bandwidth",
                "broken",
                f"the all-reduce failed on {node.host}: {each.error}",
                "set NCCL_DEBUG=INFO (or TORCH_DISTRIBUTED_DEBUG=DETAIL) in the environment, and read what it says.",
            )
    node, found = next((pair for pair in asked if pair[1].world_size), asked[0])
    said = (
        f"{found.backend}, {found.world_size} ranks: "
        f"{found.bus_bytes_per_second / 1e9:.2f} GB/s at {found.large_bytes / 2**20:.0f} MiB, "
        f"{found.small_seconds * 1e6:.0f} us at {found.small_bytes / 2**10:.0f} KiB"
    )
    mbit = node.network.link_mbit
    if question.num_nodes == 1 or mbit is None:
        return Row("bandwidth", "ok", said + (" (nothing tells the rate of the link)" * (question.num_nodes > 1)))
    share = found.bus_bytes_per_second * 8 / 1e6 / mbit
    said += f"; the link carries {mbit / 8000:.2f} GB/s, so {share:.0%} of it"
    fix = "NCCL_DEBUG=INFO says which way NCCL takes: NET/IB is the fast one; NET/Socket on InfiniBand is a wrong way."
    if found.backend == "nccl" and share < BROKEN_SHARE:
        return Row("bandwidth", "broken", said, fix)
    return Row("bandwidth", "note" if share < POOR_SHARE else "ok", said, fix if share < POOR_SHARE else "")


def _interface_fix(node: NodeFacts, library: str) -> str:
    other = [name for name in node.network.interfaces if not name.startswith(("lo", "docker"))]
    return f"set network_interface in the site profile, or {VARIABLES[library]}, to the interface between the nodes" + (
        f": {node.host} has {', '.join(other)}." if other else "."
    )


def _taken(node: NodeFacts) -> str:
    return ", ".join(f"{choice.library} takes {choice.interface}" for choice in node.network.choices)


def _all_met(question: Question, nodes: Sequence[NodeFacts]) -> bool:
    return all(len(node.network.met) == question.num_nodes for node in nodes)


def _others(nodes: Sequence[NodeFacts]) -> str:
    return ", ".join(node.host for node in nodes[1:5]) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")
