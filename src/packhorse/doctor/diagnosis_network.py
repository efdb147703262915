"""Rows about names, ports, interfaces, clocks and bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from packhorse.doctor.facts import BandwidthFacts, DoctorRequest, NodeFacts
from packhorse.doctor.interfaces import GLOO_VARIABLE, NCCL_VARIABLE
from packhorse.doctor.node import BANDWIDTH_SECONDS
from packhorse.doctor.table import Row, broken, not_tried, note, ok

NOTE_SKEW_SECONDS: Final = 1.0
MAX_SKEW_SECONDS: Final = 30.0
"""Heartbeats, time limits and W&B compare clocks of several nodes."""
BROKEN_SHARE: Final = 0.1
"""Share of the link's rate below which NCCL must be using another, slower link."""
POOR_SHARE: Final = 0.5
VARIABLES: Final = {"gloo": GLOO_VARIABLE, "nccl": NCCL_VARIABLE}


def name_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that all nodes resolve the first node's name to its address."""
    master = nodes[0].network.master_addr
    failed = [node for node in nodes if node.network.resolve_error]
    if failed:
        return broken(
            f"{failed[0].host} cannot resolve {master}, the name of the first node: {failed[0].network.resolve_error}",
            "add the names of the nodes to DNS or to /etc/hosts of all nodes, or set MASTER_ADDR to an address.",
        )
    others = dict.fromkeys(node.network.resolved for node in nodes if node.node_id != 0)
    if any(address.startswith("127.") for address in others) and not _all_met(request, nodes):
        return broken(
            f"{master}, the name of the first node, is {', '.join(others)} on other nodes: their own loopback address",
            "fix /etc/hosts of the nodes: no node's name may have the address 127.0.0.1 or 127.0.1.1.",
        )
    return ok(f"{master} is {', '.join(others) or nodes[0].network.resolved}")


def port_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that all nodes reach the port of the rendezvous."""
    port, master = nodes[0].network.master_port, nodes[0].network.master_addr
    first_error = nodes[0].network.rendezvous_error if nodes[0].node_id == 0 else ""
    if name_row(request, nodes).status == "broken":
        return not_tried("the first node's name does not lead to it; see above")
    if first_error:
        return broken(first_error, "set MASTER_PORT to a port that is free there, for example 29511.")
    failed = [node for node in nodes if node.network.rendezvous_error]
    if failed:
        hosts = first_hosts([node.host for node in failed])
        network = failed[0].network
        return broken(
            f"{hosts} cannot reach port {port} of {master} ({network.resolved}): {network.rendezvous_error}",
            "open TCP ports 20000 to 65535 between the nodes in their firewall, or set MASTER_PORT to an open one.",
        )
    return ok(f"{first_hosts([node.host for node in nodes[1:]])} can reach port {port} of {master}")


def interface_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that every node has the interface that Gloo and NCCL will use."""
    for node in nodes:
        for choice in node.network.choices:
            # On a single machine Gloo's fallback, the loopback interface, is sufficient.
            if choice.error and (request.num_nodes > 1 or not choice.address):
                return broken(
                    f"{node.host}: {choice.error}, so {choice.library} finds none", _interface_fix(node, choice.library)
                )
    return ok("; ".join(dict.fromkeys(_choices(node) for node in nodes)))


def connection_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that every node reaches every other at the address that it will use."""
    num_connections = sum(node.network.num_connections for node in nodes)
    failures = [(node, failure) for node in nodes for failure in node.network.failed_connections]
    if failures:
        node, failure = failures[0]
        other = next((each for each in nodes if each.node_id == failure.node_id), node)
        interface = next(
            (choice.interface for choice in other.network.choices if choice.library == failure.library),
            "its interface",
        )
        return broken(
            f"{node.host} cannot reach {other.host} at {failure.address} ({interface}, used by {failure.library}): "
            f"{failure.error} ({len(failures)} of {num_connections} connections fail)",
            _interface_fix(other, failure.library) + " If it is the right one, open TCP ports 20000 to 65535 on it.",
        )
    if not _all_met(request, nodes):
        return not_tried("the nodes did not meet; see above")
    return ok(f"every node reaches every other ({num_connections} connections)")


def clock_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row:
    """Check that the clocks of the nodes agree."""
    known = [node for node in nodes if node.network.clock_skew_seconds is not None]
    if len(known) < len(nodes):
        return not_tried("the nodes did not meet; see above")
    worst = max(known, key=lambda node: abs(node.network.clock_skew_seconds or 0.0))
    seconds = worst.network.clock_skew_seconds or 0.0
    fact = (
        f"the clock of {worst.host} is {abs(seconds):.3g} s {'ahead of' if seconds > 0 else 'behind'} the first node's"
    )
    fix = "switch on NTP or chrony on that node: heartbeats and logs of nodes are compared."
    if abs(seconds) > MAX_SKEW_SECONDS:
        return broken(fact, fix)
    if abs(seconds) > NOTE_SKEW_SECONDS:
        return note(fact, fix)
    return ok(f"within {abs(seconds) * 1000:.0f} ms of the first node's")


def bandwidth_row(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> Row | None:
    """Compare the speed of an all-reduce with the rate of the link."""
    ranks = request.num_nodes * (request.gpus_per_node or 1)
    if request.fast or ranks < 2:
        return None
    results = [(node, node.bandwidth) for node in nodes if node.bandwidth is not None]
    if not results:
        return not_tried("the nodes do not reach each other; see above")
    for node, result in results:
        if result.error:
            return broken(
                f"the all-reduce failed on {node.host}: {result.error}",
                "set NCCL_DEBUG=INFO (or TORCH_DISTRIBUTED_DEBUG=DETAIL) in the environment, and read the output.",
            )
    late = [node.host for node, result in results if result.timed_out]
    if late:
        return note(
            f"the all-reduce did not end within {BANDWIDTH_SECONDS:.0f} s on {first_hosts(late)}",
            "run packhorse doctor again: reading torch from a slow disk for the first time takes minutes. If it does "
            "not end then, set NCCL_DEBUG=INFO in the environment, and read the output.",
        )
    node, measured = next((pair for pair in results if pair[1].world_size), results[0])
    return _compared_with_link(measured, node, request.num_nodes)


def _compared_with_link(measured: BandwidthFacts, node: NodeFacts, num_nodes: int) -> Row:
    fact = (
        f"{measured.backend}, {measured.world_size} ranks: "
        f"{measured.bus_bytes_per_second / 1e9:.2f} GB/s at {measured.large_bytes / 2**20:.0f} MiB, "
        f"{measured.small_seconds * 1e6:.0f} us at {measured.small_bytes / 2**10:.0f} KiB"
    )
    mbit = node.network.link_mbit
    if num_nodes == 1 or mbit is None:
        return ok(fact + (" (the rate of the link is unknown)" * (num_nodes > 1)))
    share = measured.bus_bytes_per_second * 8 / 1e6 / mbit
    fact += f"; the link carries {mbit / 8000:.2f} GB/s, so {share:.0%} of it"
    fix = "look at NCCL_DEBUG=INFO: NET/IB is InfiniBand; NET/Socket on a cluster with InfiniBand is a wrong choice."
    if measured.backend == "nccl" and share < BROKEN_SHARE:
        return broken(fact, fix)
    return note(fact, fix) if share < POOR_SHARE else ok(fact)


def _interface_fix(node: NodeFacts, library: str) -> str:
    others = [name for name in node.network.interfaces if not name.startswith(("lo", "docker"))]
    return f"set network_interface in the site profile, or {VARIABLES[library]}, to the interface between the nodes" + (
        f": {node.host} has {', '.join(others)}." if others else "."
    )


def _choices(node: NodeFacts) -> str:
    return ", ".join(f"{choice.library} uses {choice.interface}" for choice in node.network.choices)


def _all_met(request: DoctorRequest, nodes: Sequence[NodeFacts]) -> bool:
    return all(len(node.network.met_nodes) == request.num_nodes for node in nodes)


def first_hosts(hosts: Sequence[str]) -> str:
    """Return the first four names, and the number of the others."""
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
