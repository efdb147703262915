from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from packhorse.doctor.interfaces import gloo_choice, interface_choices, interfaces, link_mbit, nccl_choice
from packhorse.doctor.rendezvous import Rendezvous, RendezvousServer, join_rendezvous, open_port

UP = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "192.168.0.7", "ib0": "10.0.0.7"}


@pytest.fixture
def port() -> int:
    with open_port(0) as probe:
        return int(probe.getsockname()[1])


def meet(port: int, numbers: list[int], seconds: float = 5.0) -> list[Rendezvous]:
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(lambda number: join_rendezvous("127.0.0.1", port, {"node_id": number}, seconds), numbers))


def test_all_nodes_know_all_nodes_and_the_first_ones_clock(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RendezvousServer(port, 3, 5.0)
    found = meet(port, [0, 1, 2])
    assert [sorted(each.members) for each in found] == [[0, 1, 2]] * 3
    assert all(abs(each.clock_skew_seconds or 9.0) < 0.5 for each in found)
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_clock_that_goes_ahead_is_seen(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RendezvousServer(port, 1, 5.0)
    real, here = time.time, threading.current_thread()
    monkeypatch.setattr(time, "time", lambda: real() + (100.0 if threading.current_thread() is here else 0.0))
    found = join_rendezvous("127.0.0.1", port, {"node_id": 0}, 5.0)
    server.close()
    assert found.clock_skew_seconds == pytest.approx(100.0, abs=0.5)


def test_no_node_continues_before_all_have_arrived(port: int) -> None:
    server = RendezvousServer(port, 2, 5.0)
    first, second = meet(port, [0, 1])
    passed: list[str] = []

    def late() -> None:
        time.sleep(0.3)
        passed.append("second")
        second.wait_for_all("here")

    thread = threading.Thread(target=late)
    thread.start()
    first.wait_for_all("here")
    passed.append("first")
    thread.join()
    server.close()
    assert passed == ["second", "first"]


def test_a_node_that_is_gone_is_not_waited_for(port: int) -> None:
    server = RendezvousServer(port, 2, 5.0)
    first, second = meet(port, [0, 1])
    second.close()
    began = time.monotonic()
    first.wait_for_all("here")
    server.close()
    assert time.monotonic() - began < 5


def test_a_node_waits_a_limited_time_for_the_others(port: int) -> None:
    server = RendezvousServer(port, 2, 0.3)
    (found,) = meet(port, [0])
    server.close()
    assert sorted(found.members) == [0]


def test_an_absent_first_node_is_reported(port: int) -> None:
    found = join_rendezvous("127.0.0.1", port, {"node_id": 1}, 0.3)
    assert (found.error, found.members) == ("Connection refused", {})


def test_another_service_at_the_port_is_reported(port: int) -> None:
    with open_port(port) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        found = join_rendezvous("127.0.0.1", port, {"node_id": 1}, 2.0)
        thread.join()
    assert found.error.startswith("another program answers at that port")


def test_a_port_that_is_taken(port: int) -> None:
    with open_port(port), pytest.raises(OSError, match="in use"):
        RendezvousServer(port, 2)


# Rows: NCCL's documentation of NCCL_SOCKET_IFNAME.
@pytest.mark.parametrize(
    ("variable", "interface"),
    [
        ("", "ib0"),
        ("eth", "eth0"),
        ("=eth0", "eth0"),
        ("eth0,ib0", "eth0"),
        ("^ib,docker,lo", "eth0"),
        ("^=ib0,lo,docker0", "eth0"),
        ("^docker0", "lo"),  # the kernel's first is lo, unless it is excluded too
    ],
)
def test_the_choice_of_nccl(variable: str, interface: str) -> None:
    assert nccl_choice(UP, variable).interface == interface


def test_names_without_an_interface_are_reported() -> None:
    assert "=eth" in nccl_choice(UP, "=eth").error
    found = gloo_choice(UP, "eth")
    assert (found.interface, found.address) == ("eth", "")
    assert "the interfaces that are up are lo, docker0, eth0, ib0" in found.error


def test_gloo_uses_the_address_of_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, Any] = {"gpu7": "10.0.0.7"}
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_: [(0, 0, 0, "", (named[host], 0))])
    assert gloo_choice(UP, "").interface == "ib0"
    named["gpu7"] = "127.0.1.1"
    assert gloo_choice(UP, "").interface == "lo"
    assert [each.library for each in interface_choices(UP, gpus=True, environment={})] == ["gloo", "nccl"]


def test_this_machines_interfaces() -> None:
    assert interfaces()["lo"] == "127.0.0.1"


def test_rate_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "net/eth0").mkdir(parents=True)
    (tmp_path / "net/eth0/speed").write_text("25000\n")
    assert link_mbit("eth0", gpus=True, system=tmp_path) == 25_000
    for card in ("mlx5_0", "mlx5_1"):
        ports = tmp_path / "infiniband" / card / "ports/1"
        ports.mkdir(parents=True)
        (ports / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert link_mbit("eth0", gpus=True, system=tmp_path) == 800_000
    assert link_mbit("eth0", gpus=False, system=tmp_path) == 25_000
    (tmp_path / "net/eth0/speed").write_text("-1\n")
    assert link_mbit("eth0", gpus=False, system=tmp_path) is None
