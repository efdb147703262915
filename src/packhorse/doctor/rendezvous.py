"""Rendezvous of all nodes at a port of the first one: they learn of each other, and wait for each other.

Both sides exchange lines of JSON. The others measure their clocks against the first node's as NTP does: the way back
takes half a round trip (RFC 5905, section 8).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

JOIN_SECONDS: Final = 30.0
"""How long nodes wait for each other: with a cold environment on a shared disk they start many seconds apart."""
ANSWER_SECONDS: Final = JOIN_SECONDS + 5.0
BARRIER_SECONDS: Final = 15.0
RETRY_SECONDS: Final = 0.2


class RendezvousServer:
    """Server of the first node: a list of the nodes that joined, its clock, and barriers."""

    def __init__(self, port: int, num_nodes: int, seconds: float = JOIN_SECONDS) -> None:
        """Listen at every address of this node.

        Raises:
            OSError: The port is in use.
        """
        self._server = open_port(port, num_nodes)
        self._num_nodes, self._end = num_nodes, time.monotonic() + seconds
        self._members: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._barriers: dict[str, set[int]] = {}
        self._gone: set[int] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close the port; existing connections stay open."""
        with suppress(OSError):
            # A thread blocked in accept(2) would keep the port open.
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError, KeyError), connection.makefile("rwb") as stream:
            connection.settimeout(2 * JOIN_SECONDS)
            member = read_line(stream)
            number = member["node_id"]
            write_line(stream, {"time": time.time()})
            with self._changed:
                self._members[number] = member
                self._changed.notify_all()
                self._changed.wait_for(self._is_complete, max(0.0, self._end - time.monotonic()))
                members = list(self._members.values())
            write_line(stream, {"members": members})
            try:
                while True:
                    self._pass_barrier(read_line(stream)["barrier"], number)
                    write_line(stream, {"go": True})
            finally:
                with self._changed:  # nobody waits for a node that has left
                    self._gone.add(number)
                    self._changed.notify_all()

    def _is_complete(self) -> bool:
        return len(self._members) == self._num_nodes

    def _pass_barrier(self, barrier: str, number: int) -> None:
        with self._changed:
            arrived = self._barriers.setdefault(barrier, set())
            arrived.add(number)
            self._changed.notify_all()
            self._changed.wait_for(lambda: arrived | self._gone >= set(self._members), BARRIER_SECONDS)


@dataclass
class Rendezvous:
    """Connection of one node to the rendezvous.

    Attributes:
        members: Message of each node that joined, by number.
        clock_skew_seconds: How far this node's clock is ahead of the first node's.
        error: Why this node could not join; it then continues alone.
    """

    members: dict[int, dict[str, Any]] = field(default_factory=dict)
    clock_skew_seconds: float | None = None
    error: str = ""
    _stream: Any = None

    def wait_for_all(self, name: str) -> None:
        """Wait until every node that joined has reached this barrier, or for some seconds."""
        if self._stream is not None:
            try:
                write_line(self._stream, {"barrier": name})
                read_line(self._stream)
            except (OSError, ValueError):  # the first node is gone
                self.close()

    def close(self) -> None:
        """Leave: other nodes no longer wait for this one."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
            self._stream = None


def join_rendezvous(address: str, port: int, member: Mapping[str, Any], seconds: float = JOIN_SECONDS) -> Rendezvous:
    """Connect to the first node, with retries until it listens.

    Args:
        address: Address of the first node.
        port: Port of its server.
        member: Message for the other nodes; has `node_id`.
        seconds: How long to retry.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=max(1.0, end - time.monotonic()))
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > end:
                return Rendezvous(error=describe_error(error))
            time.sleep(RETRY_SECONDS)
            continue
        return _introduce(connection, member)


def _introduce(connection: socket.socket, member: Mapping[str, Any]) -> Rendezvous:
    connection.settimeout(ANSWER_SECONDS)
    stream = connection.makefile("rwb")
    connection.close()  # takes effect when the stream is closed
    try:
        sent_at = time.time()
        write_line(stream, dict(member))
        answer = read_line(stream)
        half = (time.time() - sent_at) / 2
        members = read_line(stream)["members"]
    except (OSError, ValueError, KeyError) as error:
        stream.close()
        return Rendezvous(error=f"another program answers at that port: {describe_error(error)}")
    skew = sent_at + half - answer["time"]
    return Rendezvous({each["node_id"]: each for each in members}, skew, "", stream)


def open_port(port: int, backlog: int = 64) -> socket.socket:
    """Listen at every address of this node, IPv4 and IPv6 if the kernel has both; port 0 selects a free one.

    Raises:
        OSError: The port is in use.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=dual)


def describe_error(error: Exception) -> str:
    """Describe a failed connection."""
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


def read_line(stream: Any) -> dict[str, Any]:  # noqa: ANN401
    """Read one message.

    Raises:
        ValueError: The line is no JSON object, or the other side has closed the connection.
    """
    value = json.loads(stream.readline())
    if not isinstance(value, dict):
        raise ValueError(f"{value} is no message")
    return value


def write_line(stream: Any, value: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Send one message at once."""
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()
