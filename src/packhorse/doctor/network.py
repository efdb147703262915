"""What a node finds of the network: the first node's name and port, and every other node at the address it will use."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from packhorse.doctor.facts import Failed, NetworkFacts, Question
from packhorse.doctor.interfaces import choices, interfaces, link_mbit
from packhorse.doctor.meeting import MEET_SECONDS, Hub, Meeting, in_words, join, open_port, read_line, write_line

PEER_SECONDS: Final = 5.0
AT_ONCE: Final = 32


class Network:
    """A node in the network of an examination; closed at its end."""

    def __init__(self, node_id: int, question: Question, meet_seconds: float = MEET_SECONDS) -> None:
        """Meets the other nodes; goes on alone where it cannot."""
        self.node_id, self._question = node_id, question
        self.interfaces = interfaces()
        self.choices = choices(self.interfaces, gpus=question.gpus_per_node > 0)
        self._listener = open_port(0)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._greet, daemon=True).start()
        self._hub: Hub | None = None
        self._resolved, self._resolve_error = _resolve(question.master_addr)
        self.meeting = self._meet(meet_seconds)

    def facts(self) -> NetworkFacts:
        """What was found; tries every other node now."""
        met = self.meeting.members
        tried = _try_all(self.node_id, met)
        chosen = self.choices[-1].interface
        return NetworkFacts(
            choices=self.choices,
            interfaces=self.interfaces,
            master_addr=self._question.master_addr,
            master_port=self._question.master_port,
            resolved=self._resolved,
            resolve_error=self._resolve_error,
            hub_error=self.meeting.error,
            met=tuple(sorted(met)),
            ways=len(tried),
            failed=tuple(each for each in tried if each is not None),
            clock_skew_seconds=self.meeting.clock_skew_seconds,
            link_mbit=link_mbit(chosen, gpus=self._question.gpus_per_node > 0),
        )

    def close_listener(self) -> None:
        """Closes the port that greets other nodes."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        """Closes this node's ports."""
        self.close_listener()
        self.meeting.close()
        if self._hub is not None:
            self._hub.close()

    def _meet(self, seconds: float) -> Meeting:
        port = self._question.master_port
        if self.node_id == 0:
            try:
                self._hub = Hub(port, self._question.num_nodes, seconds)
            except OSError as error:
                return Meeting(error=f"port {port} cannot be opened on the first node: {in_words(error)}")
        elif self._resolve_error:
            return Meeting(error="not tried")
        member = {
            "node_id": self.node_id,
            "port": self.port,
            "addresses": {choice.library: choice.address for choice in self.choices if choice.address},
        }
        # The first node asks itself without the network: what is wrong with that is said by the others.
        return join("127.0.0.1" if self.node_id == 0 else self._question.master_addr, port, member, seconds)

    def _greet(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError), connection.makefile("rwb") as stream:
                write_line(stream, {"node_id": self.node_id})


def _resolve(name: str) -> tuple[str, str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return "", in_words(error)
    return str(found[0][4][0]), ""


def _try_all(node_id: int, met: dict[int, dict[str, object]]) -> list[Failed | None]:
    """Every other node, at each address that a library of it will give to the others."""
    wanted = []
    for other, member in sorted(met.items()):
        addresses, port = member["addresses"], member["port"]
        assert isinstance(addresses, dict)
        assert isinstance(port, int)
        if other != node_id:
            once = {address: library for library, address in reversed(addresses.items())}
            wanted += [(other, library, address, port) for address, library in once.items()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda each: _try(*each), wanted))


def _try(node_id: int, library: str, address: str, port: int) -> Failed | None:
    try:
        with (
            socket.create_connection((address, port), timeout=PEER_SECONDS) as connection,
            connection.makefile("rb") as stream,
        ):
            answered = read_line(stream)["node_id"]
            error = "" if answered == node_id else f"another node answered there: number {answered}"
    except (OSError, ValueError, KeyError) as fault:
        error = in_words(fault)
    return Failed(node_id=node_id, library=library, address=address, error=error) if error else None
