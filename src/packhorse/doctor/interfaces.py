"""Predict the network interface that each library will use, by the library's own rules and the kernel's data.

Gloo: torch's ProcessGroupGloo uses GLOO_SOCKET_IFNAME, else the address that this host's name resolves to.
NCCL: NCCL_SOCKET_IFNAME (NCCL documentation, environment variables) lists prefixes, separated by commas; `^` excludes
them, `=` matches names exactly. Without it NCCL prefers InfiniBand (`ib`), then any but docker and lo, docker, lo.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from packhorse.doctor.facts import InterfaceChoice

SIOCGIFADDR: Final = 0x8915
SIOCGIFFLAGS: Final = 0x8913
IS_UP: Final = 1
GLOO_VARIABLE: Final = "GLOO_SOCKET_IFNAME"
NCCL_VARIABLE: Final = "NCCL_SOCKET_IFNAME"
SYSTEM: Final = Path("/sys/class")


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that is up and has one, by name (netdevice(7))."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack_from("H", fcntl.ioctl(probe, SIOCGIFFLAGS, request), 16)[0]
                address = socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
            except OSError:  # no IPv4 address
                continue
            if flags & IS_UP:
                addresses[name] = address
    return addresses


def interface_choices(
    up: Mapping[str, str], gpus: bool, environment: Mapping[str, str] | None = None
) -> tuple[InterfaceChoice, ...]:
    """Return the choice of Gloo, which ranks use on every machine, and with GPUs that of NCCL."""
    values = os.environ if environment is None else environment
    gloo = gloo_choice(up, values.get(GLOO_VARIABLE, ""))
    return (gloo, nccl_choice(up, values.get(NCCL_VARIABLE, ""))) if gpus else (gloo,)


def gloo_choice(up: Mapping[str, str], variable: str) -> InterfaceChoice:
    """Return Gloo's interface for a value of GLOO_SOCKET_IFNAME."""
    if variable:
        name = variable.split(",", maxsplit=1)[0].strip()
        return _choice_by_name(up, "gloo", name, f"{GLOO_VARIABLE} is {variable}")
    host = socket.gethostname()
    try:
        address = socket.getaddrinfo(host, None, socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        fault = f"the host name {host} does not resolve: {error}"
        return InterfaceChoice(library="gloo", interface="lo", address="127.0.0.1", error=fault)
    name = next((name for name, own in up.items() if own == address), "")
    is_loopback = str(address).startswith("127.") or address == "::1"
    return InterfaceChoice(library="gloo", interface=name or ("lo" if is_loopback else "?"), address=str(address))


def nccl_choice(up: Mapping[str, str], variable: str) -> InterfaceChoice:
    """Return NCCL's interface for a value of NCCL_SOCKET_IFNAME."""
    if variable:
        names = [name for name in up if _matches(name, variable)]
        if not names:
            return _choice_by_name(up, "nccl", variable, f"{NCCL_VARIABLE} is {variable}")
    else:
        names = sorted(up, key=_nccl_rank)  # stable: keeps the kernel's order within a rank
    if not names:
        return InterfaceChoice(library="nccl", interface="", address="", error="no interface has an address")
    return InterfaceChoice(library="nccl", interface=names[0], address=up[names[0]])


def link_mbit(interface: str, gpus: bool, system: Path = SYSTEM) -> int | None:
    """Return Mbit/s of an interface, or with GPUs of all InfiniBand ports together; None if unknown."""
    rates = [_infiniband_mbit(file) for file in sorted(system.glob("infiniband/*/ports/*/rate"))] if gpus else []
    if any(rates):
        return sum(rates)
    try:
        speed = int((system / "net" / interface / "speed").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a virtual interface answers EINVAL
        return None
    return speed if speed > 0 else None


def _choice_by_name(up: Mapping[str, str], library: str, name: str, setting: str) -> InterfaceChoice:
    if name in up:
        return InterfaceChoice(library=library, interface=name, address=up[name])
    error = f"{setting}, and the interfaces that are up are {', '.join(up) or 'none'}"
    return InterfaceChoice(library=library, interface=name, address="", error=error)


def _matches(name: str, variable: str) -> bool:
    excludes = variable.startswith("^")
    is_exact = variable.removeprefix("^").startswith("=")
    parts = [part.strip() for part in variable.lstrip("^=").split(",") if part.strip()]
    is_listed = any(name == part if is_exact else name.startswith(part) for part in parts)
    return is_listed != excludes


def _nccl_rank(name: str) -> int:
    if name.startswith("ib"):
        return 0
    if name.startswith("docker"):
        return 2
    return 3 if name.startswith("lo") else 1


def _infiniband_mbit(file: Path) -> int:
    """Parse `400 Gb/sec (4X NDR)` as 400,000; 0 for other text."""
    try:
        number, unit, *_ = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return 0
    return int(float(number) * 1000) if unit.startswith("Gb") and number.replace(".", "").isdecimal() else 0
