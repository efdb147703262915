"""Checks of one node: `python -m packhorse.doctor.node REQUEST`, which srun starts once per node.

The answer is printed as short lines on standard output, which srun forwards: the shared folder may be broken. The
process ends within a minute, or three where it measures the bandwidth, in any case, and imports no torch.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from socket import gethostname
from typing import Final

from packhorse.doctor.facts import BandwidthFacts, DoctorRequest, NodeFacts
from packhorse.doctor.inputs import check_inputs
from packhorse.doctor.machine import gpu_facts, resource_facts, versions
from packhorse.doctor.network import NodeNetwork
from packhorse.doctor.rendezvous import open_port
from packhorse.doctor.shared_folder import check_shared_folder

MARK: Final = "packhorse-doctor"
PIECE_CHARACTERS: Final = 600
"""Characters per line: srun may split longer lines."""
MAX_SECONDS: Final = 57
BANDWIDTH_SECONDS: Final = 120.0
"""Limit of the bandwidth check: import of torch from a shared disk, the start of NCCL, and the all-reduces."""
KILL_SECONDS: Final = 10
LOWEST_PORT, NUM_PORTS = 20000, 12000


def main() -> int:
    """Answer the request on the command line."""
    signal.alarm(MAX_SECONDS)  # ends the process without an answer, which the diagnosis reports
    request = DoctorRequest.model_validate_json(sys.argv[1])
    node_id = int(os.environ.get("SLURM_NODEID", "0"))
    for line in to_lines(check_node(node_id, with_master(request))):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    # Threads may still wait for another node or a name server, and must not delay the exit.
    os._exit(0)


def with_master(request: DoctorRequest) -> DoctorRequest:
    """Return the request with the first node's name, and a port computed from the job, unless they are given."""
    name = request.master_addr or first_host(os.environ.get("SLURM_STEP_NODELIST", "")) or gethostname()
    # Below the kernel's ephemeral range (32768 and up).
    port = request.master_port or LOWEST_PORT + int(os.environ.get("SLURM_JOB_ID", str(os.getpid()))) % NUM_PORTS
    return request.model_copy(update={"master_addr": name, "master_port": port})


def check_node(node_id: int, request: DoctorRequest) -> NodeFacts:
    """Run all checks of this node, including connections to the others."""
    began = time.monotonic()
    network = NodeNetwork(node_id, request)
    try:
        network_facts = network.check()
        network.rendezvous.wait_for_all("network")
        folder = check_shared_folder(node_id, request, network.rendezvous)
        facts = NodeFacts(
            node_id=node_id,
            host=gethostname(),
            versions=versions(),
            gpu=gpu_facts(),
            network=network_facts,
            folder=folder,
            resources=resource_facts(request.scratch),
            inputs=check_inputs(node_id, request),
        )
        all_reachable = len(network_facts.met_nodes) == request.num_nodes and not network_facts.failed_connections
        if not request.fast and all_reachable:
            signal.alarm(int(BANDWIDTH_SECONDS) + KILL_SECONDS)
            bandwidth = _measure_bandwidth(node_id, request, network)
            facts = facts.model_copy(update={"bandwidth": bandwidth})
    finally:
        network.close()
    return facts.model_copy(update={"seconds": round(time.monotonic() - began, 2)})


def first_host(nodes: str) -> str:
    """Return the first node of Slurm's list: `gpu[03-05,9],login` -> `gpu03`; empty for an empty list."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def to_lines(facts: NodeFacts) -> list[str]:
    """Encode facts as short lines."""
    text = base64.b64encode(facts.model_dump_json().encode()).decode()
    pieces = [text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS)]
    return [f"{MARK} {facts.node_id} {index} {len(pieces)} {piece}" for index, piece in enumerate(pieces)]


def from_lines(lines: Iterable[str]) -> list[NodeFacts]:
    """Decode the facts of all nodes without a missing line, by number; other lines are ignored."""
    pieces: dict[int, dict[int, str]] = {}
    counts: dict[int, int] = {}
    for line in lines:
        match = re.search(rf"{MARK} (\d+) (\d+) (\d+) (\S+)\s*$", line)
        if match:
            node_id, index, count = (int(match[group]) for group in (1, 2, 3))
            pieces.setdefault(node_id, {})[index] = match[4]
            counts[node_id] = count
    complete = [node_id for node_id in sorted(pieces) if len(pieces[node_id]) == counts[node_id]]
    texts = ["".join(pieces[node_id][index] for index in range(counts[node_id])) for node_id in complete]
    return [NodeFacts.model_validate_json(base64.b64decode(text)) for text in texts]


def _measure_bandwidth(node_id: int, request: DoctorRequest, network: NodeNetwork) -> BandwidthFacts | None:
    """Run this node's ranks of the timed all-reduce; the node of rank 0 has the result, any node may have an error."""
    ranks = request.gpus_per_node or 1
    if ranks * request.num_nodes < 2:
        return None
    port = _agree_on_port(node_id, network)
    backend = "nccl" if request.gpus_per_node else "gloo"
    common = {
        **os.environ,
        "WORLD_SIZE": str(ranks * request.num_nodes),
        "MASTER_ADDR": request.master_addr,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "packhorse.doctor.bandwidth", backend]
    children = [
        subprocess.Popen(  # noqa: S603
            command,
            env={**common, "RANK": str(node_id * ranks + local), "LOCAL_RANK": str(local)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for local in range(ranks)
    ]
    return wait_for_ranks(children, BANDWIDTH_SECONDS)


def _agree_on_port(node_id: int, network: NodeNetwork) -> int:
    """Return a free port of the first node: its listener's, which it closes after all nodes know the number."""
    port = int(network.rendezvous.members[0]["port"])
    network.rendezvous.wait_for_all("port")
    if node_id == 0:
        network.close_listener()
        open_port(port).close()  # fails if the port is not free again
    network.rendezvous.wait_for_all("free")
    return port


def wait_for_ranks(children: Sequence[subprocess.Popen[str]], seconds: float) -> BandwidthFacts:
    """Return the result of the ranks, or why there is none; ranks that still run after `seconds` are ended."""
    end = time.monotonic() + seconds
    result: dict[str, object] = {}
    error, timed_out = "", False
    for child in children:
        try:
            out, err = child.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            timed_out = True
            continue
        if child.returncode:
            last = next((line for line in reversed(err.splitlines()) if line.strip()), "no output")
            error = error or f"exit code {child.returncode}: {last.strip()[:300]}"
        elif out.strip():
            result = json.loads(out.splitlines()[-1])
    return BandwidthFacts.model_validate({**result, "error": error, "timed_out": timed_out})


if __name__ == "__main__":
    sys.exit(main())
