"""Network checks of a node: the first node's name and port, and every other node at the addresses it will use."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from packhorse.doctor.facts import DoctorRequest, FailedConnection, NetworkFacts
from packhorse.doctor.interfaces import interface_choices, interfaces, link_mbit
from packhorse.doctor.rendezvous import (
    Rendezvous,
    RendezvousServer,
    describe_error,
    join_rendezvous,
    open_port,
    read_line,
    write_line,
)

CONNECT_SECONDS: Final = 5.0
MAX_THREADS: Final = 32


class NodeNetwork:
    """Ports and connections of one node during the checks."""

    def __init__(self, node_id: int, request: DoctorRequest) -> None:
        """Join the rendezvous; without it this node continues alone."""
        self.node_id, self._request = node_id, request
        self.interfaces = interfaces()
        self.choices = interface_choices(self.interfaces, gpus=request.gpus_per_node > 0)
        self._listener = open_port(0)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._greet, daemon=True).start()
        self._server: RendezvousServer | None = None
        self._resolved, self._resolve_error = _resolve(request.master_addr)
        self.rendezvous = self._join()

    def check(self) -> NetworkFacts:
        """Connect to every other node, and return all network facts."""
        members = self.rendezvous.members
        results = _connect_to_all(self.node_id, members)
        return NetworkFacts(
            choices=self.choices,
            interfaces=self.interfaces,
            master_addr=self._request.master_addr,
            master_port=self._request.master_port,
            resolved=self._resolved,
            resolve_error=self._resolve_error,
            rendezvous_error=self.rendezvous.error,
            met_nodes=tuple(sorted(members)),
            num_connections=len(results),
            failed_connections=tuple(failure for failure in results if failure is not None),
            clock_skew_seconds=self.rendezvous.clock_skew_seconds,
            link_mbit=link_mbit(self.choices[-1].interface, gpus=self._request.gpus_per_node > 0),
        )

    def close_listener(self) -> None:
        """Close the port that answers other nodes."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        """Close this node's ports and its connection to the rendezvous."""
        self.close_listener()
        self.rendezvous.close()
        if self._server is not None:
            self._server.close()

    def _join(self) -> Rendezvous:
        port = self._request.master_port
        if self.node_id == 0:
            try:
                self._server = RendezvousServer(port, self._request.num_nodes)
            except OSError as error:
                return Rendezvous(error=f"the first node cannot open port {port}: {describe_error(error)}")
        elif self._resolve_error:
            return Rendezvous(error="not tried")
        member = {
            "node_id": self.node_id,
            "port": self.port,
            "addresses": {choice.library: choice.address for choice in self.choices if choice.address},
        }
        # The first node joins without its network, whose faults the other nodes report.
        return join_rendezvous("127.0.0.1" if self.node_id == 0 else self._request.master_addr, port, member)

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
        addresses = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return "", describe_error(error)
    return str(addresses[0][4][0]), ""


def _connect_to_all(node_id: int, members: dict[int, dict[str, object]]) -> list[FailedConnection | None]:
    """Connect to every other node, at each address that one of its libraries announces."""
    targets = []
    for other, member in sorted(members.items()):
        addresses, port = member["addresses"], member["port"]
        assert isinstance(addresses, dict)
        assert isinstance(port, int)
        if other != node_id:
            library_of = {address: library for library, address in reversed(addresses.items())}
            targets += [(other, library, address, port) for address, library in library_of.items()]
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        return list(pool.map(lambda target: _connect(*target), targets))


def _connect(node_id: int, library: str, address: str, port: int) -> FailedConnection | None:
    try:
        with (
            socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection,
            connection.makefile("rb") as stream,
        ):
            answer = read_line(stream)["node_id"]
            error = "" if answer == node_id else f"another node answered there: number {answer}"
    except (OSError, ValueError, KeyError) as fault:
        error = describe_error(fault)
    return FailedConnection(node_id=node_id, library=library, address=address, error=error) if error else None
