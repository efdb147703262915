"""Which network interface each library will take, told as the library itself decides it; reads the kernel, asks nobody.

Gloo: torch's ProcessGroupGloo takes GLOO_SOCKET_IFNAME, else the address that this host's own name resolves to.
NCCL: NCCL_SOCKET_IFNAME (NCCL documentation, environment variables): prefixes with commas between; `^` leaves them out,
`=` takes exact names. Without it InfiniBand (`ib`) first, then what is neither docker nor lo, then docker, then lo.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from packhorse.doctor.facts import Choice

SIOCGIFADDR: Final = 0x8915
SIOCGIFFLAGS: Final = 0x8913
IS_UP: Final = 1
GLOO_VARIABLE: Final = "GLOO_SOCKET_IFNAME"
NCCL_VARIABLE: Final = "NCCL_SOCKET_IFNAME"
SYSTEM: Final = Path("/sys/class")


def interfaces() -> dict[str, str]:
    """Name to IPv4 address of each interface that is up and has one (netdevice(7))."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack_from("H", fcntl.ioctl(probe, SIOCGIFFLAGS, asked), 16)[0]
                address = socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, asked)[20:24])
            except OSError:  # no IPv4 address
                continue
            if flags & IS_UP:
                found[name] = address
    return found


def choices(up: Mapping[str, str], gpus: bool, environment: Mapping[str, str] | None = None) -> tuple[Choice, ...]:
    """What Gloo takes, which carries the ranks' agreements on every machine, and NCCL where there are GPUs."""
    values = os.environ if environment is None else environment
    gloo = gloo_choice(up, values.get(GLOO_VARIABLE, ""))
    return (gloo, nccl_choice(up, values.get(NCCL_VARIABLE, ""))) if gpus else (gloo,)


def gloo_choice(up: Mapping[str, str], asked: str) -> Choice:
    """Gloo's interface and address."""
    if asked:
        name = asked.split(",", maxsplit=1)[0].strip()
        return _named(up, "gloo", name, f"{GLOO_VARIABLE} is {asked}")
    host = socket.gethostname()
    try:
        address = socket.getaddrinfo(host, None, socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return Choice(library="gloo", interface="lo", address="127.0.0.1", error=f"{host} is no known name: {error}")
    name = next((name for name, own in up.items() if own == address), "")
    loopback = str(address).startswith("127.") or address == "::1"
    return Choice(library="gloo", interface=name or ("lo" if loopback else "?"), address=str(address))


def nccl_choice(up: Mapping[str, str], asked: str) -> Choice:
    """NCCL's interface and address."""
    if asked:
        found = [name for name in up if _matches(name, asked)]
        if not found:
            return _named(up, "nccl", asked, f"{NCCL_VARIABLE} is {asked}")
        return Choice(library="nccl", interface=found[0], address=up[found[0]])
    found = sorted(up, key=_nccl_rank)  # stable: the kernel's order within a rank
    if not found:
        return Choice(library="nccl", interface="", address="", error="no interface has an address")
    return Choice(library="nccl", interface=found[0], address=up[found[0]])


def link_mbit(interface: str, gpus: bool, system: Path = SYSTEM) -> int | None:
    """Mbit/s of an interface, or of all InfiniBand ports together where NCCL uses them; None where nothing says it."""
    rates = [_rate(file) for file in sorted(system.glob("infiniband/*/ports/*/rate"))] if gpus else []
    if any(rates):
        return sum(rates)
    try:
        speed = int((system / "net" / interface / "speed").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not told, or of no card: EINVAL
        return None
    return speed if speed > 0 else None


def _named(up: Mapping[str, str], library: str, name: str, where: str) -> Choice:
    if name in up:
        return Choice(library=library, interface=name, address=up[name])
    error = f"{where}, and the interfaces that are up are {words(up)}"
    return Choice(library=library, interface=name, address="", error=error)


def words(names: Iterable[str]) -> str:
    """Names with commas between, or that there are none."""
    return ", ".join(names) or "none"


def _matches(name: str, asked: str) -> bool:
    without = asked.startswith("^")
    exact = asked.removeprefix("^").startswith("=")
    parts = [part.strip() for part in asked.lstrip("^=").split(",") if part.strip()]
    hit = any(name == part if exact else name.startswith(part) for part in parts)
    return hit != without


def _nccl_rank(name: str) -> int:
    if name.startswith("ib"):
        return 0
    if name.startswith("docker"):
        return 2
    return 3 if name.startswith("lo") else 1


def _rate(file: Path) -> int:
    """`400 Gb/sec (4X NDR)` -> 400,000."""
    try:
        number, unit, *_ = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return 0
    return int(float(number) * 1000) if unit.startswith("Gb") and number.replace(".", "").isdecimal() else 0
