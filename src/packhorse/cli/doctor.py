"""`packhorse doctor`: examine this machine, this job, or nodes of a cluster, and name what is broken."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from packhorse.cli.show.text import open_console, print_plain
from packhorse.doctor.diagnosis import diagnose
from packhorse.doctor.facts import DoctorRequest
from packhorse.doctor.request import request_for_folder, request_for_run
from packhorse.doctor.run_checks import (
    check_nodes_in_short_job,
    check_nodes_of_job,
    check_this_machine,
    short_job_arguments,
)
from packhorse.doctor.table import EXIT_BROKEN, print_table
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.site import SiteProfile, load_site
from packhorse.plan.topology import detect_hardware
from packhorse.run_folder.folder import open_run


def doctor(
    run: str, site: str, nodes: int | None, gpus_per_node: int | None, fast: bool = False, dry_run: bool = False
) -> int:
    """Examine, and print one table; return 1 if a check fails."""
    console = open_console()
    in_job = "SLURM_JOB_ID" in os.environ and not site
    question, profile = _question(run, site, nodes, gpus_per_node, fast, in_job)
    if profile is not None:
        programs = profile.programs or str(Path(sys.executable).parent)
        if dry_run:
            words = ["srun", *short_job_arguments(question, profile, programs), question.model_dump_json()]
            print_plain(shlex.join(words), console)
            return EXIT_OK
        facts, notes = check_nodes_in_short_job(question, profile, programs, lambda line: print(line, file=sys.stderr))  # noqa: T201
    else:
        facts, notes = check_nodes_of_job(question) if in_job else check_this_machine(question)
    return EXIT_BROKEN if print_table(console, diagnose(question, facts, notes), all_rows=True) else EXIT_OK


def _question(
    run: str, site: str, nodes: int | None, gpus_per_node: int | None, fast: bool, in_job: bool
) -> tuple[DoctorRequest, SiteProfile | None]:
    """Return what to examine, and the profile of the cluster if that needs a job."""
    plan = open_run(run) if run else None
    wanted_nodes = nodes or (plan.topology.num_nodes if plan is not None else 1)
    profile = load_site(site or None) if site or (wanted_nodes > 1 and not in_job) else None
    scratch = (profile.scratch or "") if profile is not None else ""
    if plan is not None:
        question = request_for_run(plan, scratch, fast)
        return _check_size(question, run, nodes, gpus_per_node), profile
    folder = Path("runs") if Path("runs").is_dir() else Path.cwd()
    if profile is not None:
        gpus = profile.gpus_per_node
    elif in_job:
        wanted_nodes = nodes or int(os.environ.get("SLURM_NNODES", "1"))
        gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    else:
        gpus = len(detect_hardware().gpus)
    gpus = gpus if gpus_per_node is None else gpus_per_node
    return request_for_folder(folder, wanted_nodes, gpus, scratch, fast), profile


def _check_size(question: DoctorRequest, run: str, nodes: int | None, gpus_per_node: int | None) -> DoctorRequest:
    """Return the question of a run, whose plan states its nodes and GPUs.

    Raises:
        UserError: The flags request other nodes or GPUs.
    """
    planned = (question.num_nodes, question.gpus_per_node)
    requested = (nodes or planned[0], planned[1] if gpus_per_node is None else gpus_per_node)
    if requested == planned:
        return question
    raise UserError(
        f"{run} is planned for {planned[0]} nodes x {planned[1]} GPUs; --nodes and --gpus-per-node request "
        f"{requested[0]} x {requested[1]}.",
        "the doctor examines what the run will use.",
        "remove --nodes and --gpus-per-node, or the run.",
    )
