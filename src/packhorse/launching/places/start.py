"""One node's launch in a container: `python -m packhorse.launching.places.start RUN NODE_RANK ADDRESS PORT`.

A manifest names this and not the launch itself: where Packhorse lies in a container, only the container knows. And a
container that is to end has SIGTERM sent to its first process alone: here that asks all ranks, by RUN/STOP, to save.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from packhorse.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from packhorse.launching.local.environment import launch_environment, path_with_programs
from packhorse.plan.command import launch_argv
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.jobs import require_prepared_data
from packhorse.run_folder.layout import STOP_FILE

OF_A_POD: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES", "PET_NPROC_PER_NODE",
                   "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")  # fmt: skip
"""What an operator sets for a pod, and the launcher sets for each rank."""


def main(words: Sequence[str]) -> int:
    """Starts this node's share of a run, and waits for its end."""
    if len(words) != 4:
        sys.stderr.write("usage: python -m packhorse.launching.places.start RUN NODE_RANK ADDRESS PORT\n")
        return EXIT_USER_ERROR
    run, node_rank, address, port = words
    try:
        argv, environment = launch_of(run, node_rank, address, port, os.environ)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return _watched(argv, environment, Path(run) / STOP_FILE)


def _watched(argv: Sequence[str], environment: Mapping[str, str], stop: Path) -> int:
    """Runs the launch to its end; returns its exit code, 75 where it was asked to stop."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        stop.touch()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    with subprocess.Popen(argv, env=environment, start_new_session=True) as child:  # noqa: S603
        code = child.wait()
    if asked:
        stop.unlink(missing_ok=True)  # the ranks may have ended before they saw it; the next ones must not
    return EXIT_STOPPED if asked else code


def launch_of(
    run: str, node_rank: str, address: str, port: str, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Words and environment of this node's launch.

    Raises:
        UserError: There is no such run, its data is not prepared, or it was planned for fewer nodes.
    """
    plan = open_run(run)
    require_prepared_data(plan)
    nodes = plan.topology.num_nodes
    if not node_rank.isdecimal() or int(node_rank) >= nodes:
        raise UserError(
            f"this is node {node_rank}, and the plan of {run} has nodes 0 to {nodes - 1}.",
            "each node starts its own share of the ranks.",
            f"ask for {nodes} nodes, or plan the recipe for more: packhorse plan RECIPE --nodes N --write.",
        )
    launcher, verb, *words = launch_argv(plan.topology, Path(plan.run_folder))
    meet = ["--machine_rank", node_rank, "--main_process_ip", address, "--main_process_port", port]
    kept = {name: value for name, value in environment.items() if name not in OF_A_POD}
    ours = {**launch_environment(plan.topology), "PATH": path_with_programs(environment)}
    return [launcher, verb, *meet, *words], {**kept, **ours}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
