"""One node's part of an examination: `python -m packhorse.doctor.node QUESTION`, once a node, started by srun.

It says what it found in short lines on standard output, which srun carries to whoever asked: the shared folder may be
what is broken. It ends within the examination's time, whatever is broken, and imports no torch.
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

from packhorse.doctor.facts import BandwidthFacts, NodeFacts, Question
from packhorse.doctor.folder import examine_folder
from packhorse.doctor.machine import gpu_facts, room_facts, versions
from packhorse.doctor.meeting import open_port
from packhorse.doctor.network import Network
from packhorse.doctor.store import store_facts

MARK: Final = "packhorse-doctor"
PIECE: Final = 600
"""Characters a line: srun may cut longer ones in two."""
LAST_SECOND: Final = 57
BANDWIDTH_ENDS: Final = 54.0
"""Seconds from this node's start; torch takes some to import, and may be waiting for others then."""
LOWEST_PORT, PORTS = 20000, 12000


def main() -> int:
    """Answers the question on the command line."""
    signal.alarm(LAST_SECOND)  # ends the process: to be silent is an answer too
    question = Question.model_validate_json(sys.argv[1])
    node_id = int(os.environ.get("SLURM_NODEID", "0"))
    for line in to_lines(examine(node_id, at_first_node(question))):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    # Threads that still wait for another node, or for a name, must not keep this one.
    os._exit(0)


def at_first_node(question: Question) -> Question:
    """The question with the first node's name and a port of the job, where they are not given."""
    name = question.master_addr or first_host(os.environ.get("SLURM_STEP_NODELIST", "")) or gethostname()
    # Below what the kernel hands out to others (32768 and up).
    port = question.master_port or LOWEST_PORT + int(os.environ.get("SLURM_JOB_ID", str(os.getpid()))) % PORTS
    return question.model_copy(update={"master_addr": name, "master_port": port})


def examine(node_id: int, question: Question) -> NodeFacts:
    """Looks at this node, and from it at the others."""
    began = time.monotonic()
    network = Network(node_id, question)
    try:
        met = network.facts()
        network.meeting.wait_for_all("network")
        folder = examine_folder(node_id, question, network.meeting)
        facts = NodeFacts(
            node_id=node_id,
            host=gethostname(),
            versions=versions(),
            gpu=gpu_facts(),
            network=met,
            folder=folder,
            room=room_facts(question.scratch),
            store=store_facts(node_id, question),
        )
        everybody = len(met.met) == question.num_nodes and not met.failed
        if not question.fast and everybody:
            facts = facts.model_copy(
                update={"bandwidth": _bandwidth(node_id, question, network, began + BANDWIDTH_ENDS)}
            )
    finally:
        network.close()
    return facts.model_copy(update={"seconds": round(time.monotonic() - began, 2)})


def first_host(names: str) -> str:
    """The first of a list of nodes as Slurm writes it: `gpu[03-05,9],login` -> `gpu03`; empty of an empty one."""
    first = re.split(r",(?![^\[]*\])", names)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def to_lines(facts: NodeFacts) -> list[str]:
    """Facts as short lines."""
    text = base64.b64encode(facts.model_dump_json().encode()).decode()
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    return [f"{MARK} {facts.node_id} {index} {len(pieces)} {piece}" for index, piece in enumerate(pieces)]


def from_lines(lines: Iterable[str]) -> list[NodeFacts]:
    """Facts of all nodes whose lines are all there, by number; other lines are passed over."""
    pieces: dict[int, dict[int, str]] = {}
    counts: dict[int, int] = {}
    for line in lines:
        found = re.search(rf"{MARK} (\d+) (\d+) (\d+) (\S+)\s*$", line)
        if found:
            node_id, index, count = (int(found[group]) for group in (1, 2, 3))
            pieces.setdefault(node_id, {})[index] = found[4]
            counts[node_id] = count
    whole = [node_id for node_id in sorted(pieces) if len(pieces[node_id]) == counts[node_id]]
    texts = ["".join(pieces[node_id][index] for index in range(counts[node_id])) for node_id in whole]
    return [NodeFacts.model_validate_json(base64.b64decode(text)) for text in texts]


def _bandwidth(node_id: int, question: Question, network: Network, end: float) -> BandwidthFacts | None:
    """Starts this node's ranks of the timed all-reduce; only rank 0's node has an answer, each may have an error."""
    ranks = question.gpus_per_node or 1
    if ranks * question.num_nodes < 2:
        return None
    port = _agreed_port(node_id, network)
    backend = "nccl" if question.gpus_per_node else "gloo"
    common = {
        **os.environ,
        "WORLD_SIZE": str(ranks * question.num_nodes),
        "MASTER_ADDR": question.master_addr,
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
    return _answer(children, end)


def _agreed_port(node_id: int, network: Network) -> int:
    """A free port of the first node: that of its greeting, which it gives up after everybody has heard of it."""
    port = int(network.meeting.members[0]["port"])
    network.meeting.wait_for_all("port")
    if node_id == 0:
        network.close_listener()
        open_port(port).close()  # it is free again
    network.meeting.wait_for_all("free")
    return port


def _answer(children: Sequence[subprocess.Popen[str]], end: float) -> BandwidthFacts:
    answer: dict[str, object] = {}
    error = ""
    for child in children:
        try:
            out, said = child.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            error = error or "not done within a minute"
            continue
        if child.returncode:
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing said")
            error = error or f"ended with {child.returncode}: {last.strip()[:300]}"
        answer = json.loads(out.splitlines()[-1]) if out.strip() and not child.returncode else answer
    return BandwidthFacts.model_validate({**answer, "error": error})


if __name__ == "__main__":
    sys.exit(main())
