"""The ranks of a plan, forked from a process that has imported all: a launch without the seconds that this takes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing as mp
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from cli import INJECTED, PACKHORSE, ROOM
from packhorse.launching.local.environment import FOLDER_VARIABLE, extensions_folder, remove_abandoned_locks
from packhorse.plan.replan import replace_plan, replan
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.workflows.new_run import write_run

IMPORTED = ["deepspeed", "packhorse.train.worker"]
# The first that needs DeepSpeed on a new machine waits for g++.
SECONDS, GRACE_SECONDS = 600.0, 5.0


def planned(recipe: Path, name: str, *words: str) -> Path:
    """A run folder as `packhorse plan --write` makes it; its runs stand beside the recipe."""
    runs = recipe.parent / "runs"
    write_run(str(recipe), [f"name={name}", f"runs_folder={runs}", *words], None, None)
    return runs / name


def trained(recipe: Path, name: str, *words: str) -> Path:
    """The folder of a new run, trained to its end."""
    run = planned(recipe, name, *words)
    to_the_end(run)
    return run


def resumed(run: Path, attempt: int, *words: str) -> None:
    """Resumes a run on other processes or under another engine, and trains it to its end; `attempt` begins now."""
    plan = read_plan(run)
    made = replan(plan, words, DeviceRequest(None), detect_hardware(), attempt - 1)
    if made != plan:
        replace_plan(made)
    to_the_end(run, attempt)


def to_the_end(run: Path, attempt: int = 1) -> None:
    """Runs every rank once; each must end well."""
    ended = [(record["exit_code"], record["message"]) for record in run_ranks(run, attempt=attempt)]
    assert ended == [(0, "")] * read_plan(run).topology.world_size, last_words(run) or ended


def last_words(run: Path) -> str:
    """The end of what each rank printed."""
    logs = sorted([*run.glob("rank-*.log"), *run.glob("logs/attempt-*/rank-*.log")])
    return "\n".join(f"{log.name}: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}" for log in logs)


def run_ranks(
    run: Path, fault: str = "", attempt: int = 1, before: Callable[[Path, int], None] | None = None
) -> list[dict[str, Any]]:
    """Runs every rank of a plan once; what each left in rank-R.json, in order.

    A rank that waits for one that has ended is ended too, as the launcher would do, and leaves nothing. With `before`,
    which each rank calls first, ranks are forked from this process, which has imported all.
    """
    plan = read_plan(run)
    remove_abandoned_locks(extensions_folder())  # as our launcher does: what was killed may have been building
    context: Any = mp.get_context("fork" if before else "forkserver")
    with mock.patch.dict(os.environ, plan.env):
        context.set_forkserver_preload(IMPORTED)
        arguments = [
            (rank, run, variables | {"PACKHORSE_ATTEMPT": str(attempt)}, fault, before)
            for rank, variables in enumerate(_variables(plan))
        ]
        ranks = [context.Process(target=_rank, args=each) for each in arguments]
        for rank in ranks:
            rank.start()
    _wait(ranks)
    records = [run / "logs" / f"attempt-{attempt}" / f"rank-{rank}.json" for rank in _all(plan)]
    return [json.loads(record.read_text(encoding="utf-8")) for record in records if record.is_file()]


def _all(plan: RunPlan) -> range:
    return range(plan.topology.world_size)


def _variables(plan: RunPlan) -> list[dict[str, str]]:
    """What `accelerate launch` would set for each rank, by its own hand, and what its agent adds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told: dict[str, str] = {}
    agent: dict[str, str] = {}
    world = str(plan.topology.world_size)

    def start_agent(_: argparse.Namespace) -> None:
        told.update(os.environ)
        agent.update(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def start_process(arguments: argparse.Namespace) -> None:  # one rank on one GPU
        told.update(prepare_simple_launcher_cmd_env(arguments)[1])

    # With a port, else accelerate warns where another launch has its default one.
    words = ["--main_process_port", str(port), *plan.argv[2:]]
    with (
        mock.patch("torch.distributed.run.run", side_effect=start_agent),
        mock.patch("accelerate.commands.launch.simple_launcher", side_effect=start_process),
    ):
        launch_command(launch_command_parser().parse_args(words))
    # As our launcher has it: where DeepSpeed's C++ parts are built, and with which ninja.
    ours = {FOLDER_VARIABLE: str(extensions_folder()), "PATH": f"{PACKHORSE.parent}{os.pathsep}{os.environ['PATH']}"}
    found = {**told, **plan.env, **agent, **ours, "HF_HUB_OFFLINE": "1"}
    # Ranks of two and more keep the plan's number of threads: they are compared bit for bit with ranks of a launch.
    found |= {"OMP_NUM_THREADS": "1"} if world == "1" else {}
    return [found | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if agent else {}) for rank in _all(plan)]


def _rank(
    rank: int, run: Path, variables: dict[str, str], fault: str, before: Callable[[Path, int], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    log = (run / f"rank-{rank}.log").open("a", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    from packhorse.train import loop
    from packhorse.train.ranks import hang_watch
    from packhorse.train.ranks.signals import StopRequest
    from packhorse.train.worker import run_worker

    if before:
        before(run, rank)
    # Of ranks that hang, rank 0 ends last: the others close its connections while it waits, the harder order.
    hang_watch.REPORT_SECONDS *= ROOM * (2 if rank == 0 else 1)
    if fault:
        _injected().Fault(fault, None).install(loop)
    signals = StopRequest()
    signals.install()
    sys.exit(run_worker(run / "plan.json", signals))


def _injected() -> Any:
    spec = importlib.util.spec_from_file_location("injected", INJECTED / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wait(ranks: list[BaseProcess]) -> None:
    end = time.monotonic() + SECONDS
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
