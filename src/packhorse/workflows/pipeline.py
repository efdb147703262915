"""Jobs that follow the training of a submitted run: evaluate and verify, each after the one before has succeeded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from packhorse.launching.slurm.script import JobRequest, cpu_request, gpu_request
from packhorse.launching.slurm.submit import PlannedJob, planned_job
from packhorse.plan.evaluation import shards_weights
from packhorse.run_folder.jobs import JobKind
from packhorse.run_folder.layout import LOGS_FOLDER
from packhorse.workflows.submit_run import Submission, planned_jobs


def pipeline_jobs(submission: Submission) -> list[PlannedJob]:
    """Return the jobs of a run in order: prepare, train, evaluate, verify.

    Raises:
        UserError: See `submit_run.planned_jobs`.
    """
    site, run = submission.site, Path(submission.plan.run_folder)
    requests: dict[JobKind, JobRequest] = {
        "evaluate": _evaluation(submission),
        "verify": cpu_request(site, submission.plan.recipe.name, run / LOGS_FOLDER, "verify"),
    }
    following = [planned_job(site, kind, request, kind, str(run)) for kind, request in requests.items()]
    return planned_jobs(submission) + following


def _evaluation(submission: Submission) -> JobRequest:
    """Request one GPU if training uses GPUs, or those of a node where training shards the weights over them."""
    topology = submission.plan.topology
    site, name = submission.site, submission.plan.recipe.name
    logs = Path(submission.plan.run_folder) / LOGS_FOLDER
    on_cpu = cpu_request(site, name, logs, "evaluate")
    if topology.device == "cpu":
        return on_cpu
    gpus = topology.processes_per_node if shards_weights(topology.engine) else 1
    return replace(gpu_request(site, name, logs, "evaluate", gpus), time=on_cpu.time)
