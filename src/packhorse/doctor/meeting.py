"""All nodes of an examination come to the first one's port, learn of each other, and wait for each other.

A line of JSON each way. The first node's clock is what the others measure theirs against, as NTP does it: half a round
trip is taken for the way back (RFC 5905, section 8).
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

MEET_SECONDS: Final = 30.0
"""How long nodes wait for each other: a cold environment on a shared disk starts many seconds apart."""
ANSWER_SECONDS: Final = MEET_SECONDS + 5.0
BARRIER_SECONDS: Final = 15.0
AGAIN_SECONDS: Final = 0.2


class Hub:
    """What the first node offers: a list of who came, the time, and barriers."""

    def __init__(self, port: int, num_nodes: int, seconds: float = MEET_SECONDS) -> None:
        """Opens the port at every address of this node.

        Raises:
            OSError: It is taken.
        """
        self._server = open_port(port, num_nodes)
        self._num_nodes, self._end = num_nodes, time.monotonic() + seconds
        self._members: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._barriers: dict[str, set[int]] = {}
        self._gone: set[int] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Closes the port; who is connected stays so."""
        with suppress(OSError):
            # A thread that waits in accept(2) would keep the port open.
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
            connection.settimeout(2 * MEET_SECONDS)
            member = read_line(stream)
            number = member["node_id"]
            write_line(stream, {"time": time.time()})
            with self._changed:
                self._members[number] = member
                self._changed.notify_all()
                self._changed.wait_for(self._is_complete, max(0.0, self._end - time.monotonic()))
                met = list(self._members.values())
            write_line(stream, {"members": met})
            try:
                while True:
                    self._pass(read_line(stream)["barrier"], number)
                    write_line(stream, {"go": True})
            finally:
                with self._changed:  # a node that is gone is not waited for
                    self._gone.add(number)
                    self._changed.notify_all()

    def _is_complete(self) -> bool:
        return len(self._members) == self._num_nodes

    def _pass(self, barrier: str, number: int) -> None:
        with self._changed:
            came = self._barriers.setdefault(barrier, set())
            came.add(number)
            self._changed.notify_all()
            self._changed.wait_for(lambda: came | self._gone >= set(self._members), BARRIER_SECONDS)


@dataclass
class Meeting:
    """A node's place in the meeting.

    Attributes:
        members: What each node that came said of itself, by number.
        clock_skew_seconds: How far this clock is ahead of the first node's.
        error: Why this node did not come to the first one; it then goes on alone.
    """

    members: dict[int, dict[str, Any]] = field(default_factory=dict)
    clock_skew_seconds: float | None = None
    error: str = ""
    _stream: Any = None

    def wait_for_all(self, name: str) -> None:
        """Returns when every node that came has come here, or after a while."""
        if self._stream is not None:
            try:
                write_line(self._stream, {"barrier": name})
                read_line(self._stream)
            except (OSError, ValueError):  # the first node is gone
                self.close()

    def close(self) -> None:
        """Leaves: the others no longer wait for this node."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
            self._stream = None


def join(address: str, port: int, member: Mapping[str, Any], seconds: float = MEET_SECONDS) -> Meeting:
    """Comes to the first node, again and again until it is there.

    Args:
        address: Of the first node.
        port: That it opened.
        member: What the others should know; has `node_id`.
        seconds: How long to try.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=max(1.0, end - time.monotonic()))
        except OSError as error:
            if time.monotonic() + AGAIN_SECONDS > end:
                return Meeting(error=in_words(error))
            time.sleep(AGAIN_SECONDS)
            continue
        return _introduced(connection, member)


def _introduced(connection: socket.socket, member: Mapping[str, Any]) -> Meeting:
    connection.settimeout(ANSWER_SECONDS)
    stream = connection.makefile("rwb")
    connection.close()  # when the stream is
    try:
        asked_at = time.time()
        write_line(stream, dict(member))
        answer = read_line(stream)
        half = (time.time() - asked_at) / 2
        members = read_line(stream)["members"]
    except (OSError, ValueError, KeyError) as error:
        stream.close()
        return Meeting(error=f"what answers there is not the first node: {in_words(error)}")
    skew = asked_at + half - answer["time"]
    return Meeting({each["node_id"]: each for each in members}, skew, "", stream)


def open_port(port: int, backlog: int = 64) -> socket.socket:
    """Listens at every address of this node, of both kinds where the kernel has them; 0 takes a free port.

    Raises:
        OSError: The port is taken.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


def in_words(error: Exception) -> str:
    """What went wrong with a connection."""
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


def read_line(stream: Any) -> dict[str, Any]:  # noqa: ANN401
    """One line of JSON.

    Raises:
        ValueError: It is none, or the other side has ended.
    """
    value = json.loads(stream.readline())
    if not isinstance(value, dict):
        raise ValueError(f"{value} is no message")
    return value


def write_line(stream: Any, value: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Sends one line of JSON at once."""
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()
