"""What it costs that all ranks find each other: the store, the group for control, the first agreement; by world size.

    python benchmarks/rendezvous.py [--ranks 8 16 32] [--write]

The ranks are processes of this machine without a model; they join as the worker's do (a TCP store at rank 0, a Gloo
group, and a second one for flags and figures), and agree once. Few cores share the work, so CPU seconds and sockets of
a rank are what carries over to other machines, and the wall time is not. `lazy`: with TORCH_GLOO_LAZY_INIT, where two
ranks connect when they first speak; else each connects to all.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lab_log

LAZY = "TORCH_GLOO_LAZY_INIT"
TIMEOUT = timedelta(minutes=10)
FIGURES = ("store", "group", "control", "agree")


def main() -> None:
    """Measures each world size, both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--write", action="store_true", help="append to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="two ranks, to see that it runs")
    asked = parser.parse_args()
    if asked.smoke:
        asked.ranks = [2]
    rows = []
    for lazy in (False, True):
        for world_size in asked.ranks:
            rows.append(_row(world_size, lazy, _measure(world_size, lazy)))
    header = [
        "ranks",
        "Gloo",
        *(f"{name}, CPU ms" for name in FIGURES),
        "all of rank 0",
        "sockets",
        "of rank 0",
        "wall s",
    ]
    text = f"{lab_log.machine(1, ['torch'])}\n\n{lab_log.markdown_table(header, rows)}"
    print(text)
    if asked.write:
        lab_log.append("Rendezvous of ranks without a model", text)


def _row(world_size: int, lazy: bool, ranks: Sequence[dict[str, float]]) -> list[str]:
    """Means over all ranks, and rank 0's own."""
    mean = {name: sum(rank[name] for rank in ranks) / world_size for name in (*FIGURES, "sockets")}
    wall = max(rank["wall"] for rank in ranks)
    figures = [f"{1000 * mean[name]:.1f}" for name in FIGURES]
    # The store's server is a thread of rank 0: what all others ask for is found here.
    figures.append(f"{1000 * sum(ranks[0][name] for name in FIGURES):.1f}")
    sockets = [f"{mean['sockets']:.0f}", f"{ranks[0]['sockets']:.0f}"]
    return [str(world_size), "lazy" if lazy else "all pairs", *figures, *sockets, f"{wall:.2f}"]


def _measure(world_size: int, lazy: bool) -> list[dict[str, float]]:
    os.environ[LAZY] = "1" if lazy else "0"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked: torch is imported once, and what is measured begins when all are there.
    context = mp.get_context("fork")
    pipes = [context.Pipe() for _ in range(world_size)]
    ranks = [context.Process(target=_rank, args=(rank, world_size, port, pipe)) for rank, (_, pipe) in enumerate(pipes)]
    for rank in ranks:
        rank.start()
    for ours, _ in pipes:
        ours.recv()
    for ours, _ in pipes:
        ours.send("go")
    found = [json.loads(ours.recv()) for ours, _ in pipes]
    for ours, _ in pipes:
        ours.send("leave")  # nobody waits for another any more
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    return found


def _rank(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send("here")
    pipe.recv()
    began, spent, figures = time.perf_counter(), time.process_time(), {}

    def mark(name: str) -> None:
        nonlocal spent
        now = time.process_time()
        figures[name], spent = now - spent, now

    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=TIMEOUT)
    mark("store")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    mark("group")
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    mark("control")
    dist.all_reduce(torch.zeros(5, dtype=torch.float64), group=control)
    mark("agree")
    figures["wall"] = time.perf_counter() - began
    figures["sockets"] = sum(_is_socket(path) for path in Path("/proc/self/fd").iterdir())
    pipe.send(json.dumps(figures))
    pipe.recv()
    dist.destroy_process_group()


def _is_socket(path: Path) -> bool:
    try:
        return str(path.readlink()).startswith("socket:")
    except OSError:
        return False


if __name__ == "__main__":
    main()
