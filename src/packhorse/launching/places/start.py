"""Start one node in a container: `python -m packhorse.launching.places.start RUN NODE_RANK ADDRESS PORT`.

The task files run this module and not `accelerate launch`, because only the container knows where Packhorse is
installed in it. A container receives SIGTERM only in its first process: this one asks all ranks to save, by RUN/STOP.
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

POD_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES",
                        "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")  # fmt: skip
"""Variables that an operator sets for a pod; the launcher sets its own for each rank."""


def main(words: Sequence[str]) -> int:
    """Start this node's ranks, and wait until they end."""
    if len(words) != 4:
        sys.stderr.write("usage: python -m packhorse.launching.places.start RUN NODE_RANK ADDRESS PORT\n")
        return EXIT_USER_ERROR
    run, node_rank, address, port = words
    try:
        argv, environment = launch_of_node(run, node_rank, address, port, os.environ)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return _run_launcher(argv, environment, Path(run) / STOP_FILE)


def _run_launcher(argv: Sequence[str], environment: Mapping[str, str], stop: Path) -> int:
    """Run the launcher; return its exit code, or 75 after a stop request."""
    is_stopping = False

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        stop.touch()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    with subprocess.Popen(argv, env=environment, start_new_session=True) as child:  # noqa: S603
        code = child.wait()
    if is_stopping:
        stop.unlink(missing_ok=True)  # ranks that ended before they read it must not stop the next attempt
    return EXIT_STOPPED if is_stopping else code


def launch_of_node(
    run: str, node_rank: str, address: str, port: str, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return argument list and environment of this node's launcher.

    Raises:
        UserError: There is no such run, its data is not prepared, or it was planned for fewer nodes.
    """
    plan = open_run(run)
    require_prepared_data(plan)
    nodes = plan.topology.num_nodes
    if not node_rank.isdecimal() or int(node_rank) >= nodes:
        raise UserError(
            f"this is node {node_rank}, and the plan of {run} has nodes 0 to {nodes - 1}.",
            "each node starts its share of the planned ranks.",
            f"request {nodes} nodes, or plan the recipe for more: packhorse plan RECIPE --nodes N --write.",
        )
    launcher, verb, *words = launch_argv(plan.topology, Path(plan.run_folder))
    rendezvous = ["--machine_rank", node_rank, "--main_process_ip", address, "--main_process_port", port]
    kept = {name: value for name, value in environment.items() if name not in POD_VARIABLES}
    ours = {**launch_environment(plan.topology), "PATH": path_with_programs(environment)}
    return [launcher, verb, *rendezvous, *words], {**kept, **ours}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
