"""What slurm/job.sbatch asks Python inside a job; runs no program of Slurm's, which a container may lack.

python -m packhorse.launching.slurm.in_job begin RUN MOST
    answers with the number of the attempt, threads of a rank and the words of the launch, a line each; or `finished`
python -m packhorse.launching.slurm.in_job end RUN MOST CODE ASKED ENDED
    answers with what the script does now, and its exit code
python -m packhorse.launching.slurm.in_job followed RUN JOB
    writes down the job that goes on with this one
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from packhorse.errors import EXIT_OK, EXIT_STOPPED, UserError
from packhorse.launching.local.outcome import Outcome, determine_outcome, newest_step, stopped_outcome
from packhorse.launching.local.watch import ForcedEnd, RankWatcher
from packhorse.launching.slurm.decision import Asked, Situation, Verdict, decide
from packhorse.plan.command import launch_argv
from packhorse.plan.replan import replace_plan, with_smaller_micro
from packhorse.plan.run_plan import ATTEMPT_VARIABLE, RunPlan
from packhorse.recipe.shipped import shipped_path
from packhorse.run_folder.attempts import (
    AttemptStart,
    count_attempts_without_progress,
    end_attempt,
    ended_early,
    is_cause,
    outcome_of,
    read_attempts,
    read_rank_records,
    record_killed_attempts,
)
from packhorse.run_folder.folder import next_attempt, open_run, relative
from packhorse.run_folder.heartbeat import read_heartbeats
from packhorse.run_folder.jobs import JobRecord, append_job, read_jobs, require_prepared_data
from packhorse.run_folder.layout import ATTEMPT_FOLDERS, CANCEL_FILE, LOGS_FOLDER, STOP_FILE, numbered
from packhorse.run_folder.lock import lock_for_job, release_job_lock
from packhorse.run_folder.status import Status, read_status, write_status

EXIT_IN_VAIN: Final = 30
CHAIN_VARIABLE: Final = "PACKHORSE_CHAIN"
"""Number of the first of the jobs that go on with each other."""


def begin(run: str, most_in_vain: int, environment: Mapping[str, str]) -> list[str]:
    """Begins an attempt of this job.

    Args:
        run: The run's folder.
        most_in_vain: Attempts in a row that may gain no step.
        environment: Of the job.

    Returns:
        The number of the attempt, threads of a rank, and the words after `accelerate launch`; just `finished` where
        nothing is left to do.

    Raises:
        UserError: The run was cancelled, waits for its data, is run by somebody else, was planned for another job, or
            gains no step any more.
    """
    plan = open_run(run)
    folder = Path(plan.run_folder)
    now = read_status(folder)
    if now is not None and now.state == "finished":
        return ["finished"]
    if (folder / CANCEL_FILE).exists():
        raise UserError(
            f"{relative(folder)} was cancelled.",
            "a job that was queued before begins all the same.",
            f"to go on with it: packhorse resume {relative(folder)}",
            exit_code=EXIT_STOPPED,
        )
    require_prepared_data(plan)
    _check_job(plan, environment)
    words = launch_argv(plan.topology, folder)[2:]
    if any("\n" in word for word in words):
        raise UserError(
            "a line break stands in the path of the run, or of Packhorse.",
            "the job script reads a word a line.",
            "give it a path without.",
        )
    job, chain = environment["SLURM_JOB_ID"], environment[CHAIN_VARIABLE]
    lock_for_job(folder, job, chain)
    record_killed_attempts(folder)
    try:
        _refuse_more_in_vain(folder, chain, most_in_vain)
    except UserError:
        release_job_lock(folder, job)
        raise
    _take_stop_away(folder)
    attempt, _ = next_attempt(folder, AttemptStart(started_at=time.time(), from_step=newest_step(folder), chain=chain))
    return [str(attempt), str(_threads(plan, environment)), *words]


def end(run: str, most_in_vain: int, code: int, asked: Asked, environment: Mapping[str, str]) -> Verdict:
    """Judges the attempt, writes down how it ended, and says what the job script does now.

    Args:
        run: The run's folder.
        most_in_vain: Attempts in a row that may gain no step.
        code: Exit code of srun.
        asked: What Slurm asked of the script.
        environment: Of the job.
    """
    plan = open_run(run)
    folder, attempt = Path(plan.run_folder), int(environment[ATTEMPT_VARIABLE])
    logs = folder / LOGS_FOLDER / numbered(ATTEMPT_FOLDERS, attempt)
    outcome = _outcome(plan, logs, attempt, code, asked)
    end_attempt(folder, attempt, outcome_of(outcome.exit_code, outcome.again), outcome.headline, time.time())
    _take_stop_away(folder)
    verdict = decide(
        outcome,
        asked,
        Situation(
            signalled=any(record.get("signalled") for record in read_rank_records(logs)),
            cancelled=(folder / CANCEL_FILE).exists(),
            num_in_vain=count_attempts_without_progress(folder, environment[CHAIN_VARIABLE], newest_step(folder)),
            most_in_vain=most_in_vain,
            attempts=read_attempts(folder),
        ),
    )
    if outcome.again == "shrink" and verdict.word == "again":
        verdict = _shrunk(plan, verdict)
    if verdict.word != "again":
        release_job_lock(folder, environment["SLURM_JOB_ID"])
    return verdict


def followed(run: str, job: str, environment: Mapping[str, str]) -> None:
    """Writes into RUN/jobs.jsonl which job goes on with the run when this one ends; submitted like this one."""
    folder = Path(open_run(run).run_folder)
    before = [job.argv for job in read_jobs(folder) if job.kind == "train"]
    by_hand = ("sbatch", "--parsable", str(shipped_path("slurm", "job.sbatch")), str(folder))
    record = JobRecord(
        job_id=job,
        kind="train",
        submitted_at=time.time(),
        argv=before[-1] if before else by_hand,
        goes_on_from=environment["SLURM_JOB_ID"],
    )
    append_job(folder, record)


def _outcome(plan: RunPlan, logs: Path, attempt: int, code: int, asked: Asked) -> Outcome:
    status = read_status(Path(plan.run_folder))
    told = status.state if status is not None and status.attempt == attempt else None
    if told == "finished":
        return Outcome(EXIT_OK)
    if asked.to_stop and not read_heartbeats(logs):
        return stopped_outcome(plan, attempt, "stopped before the ranks had begun")
    records = read_rank_records(logs)
    # A rank that srun ended while it was leaving, once rank 0 had said that all have saved, tells nothing.
    failed = any(ended_early(record) and is_cause(record) for record in records)
    ending = None if told == "stopped" and not failed else _hung(logs, records) or RankWatcher(plan, logs).look()
    return determine_outcome(plan, logs, attempt, ending, code)


def _hung(logs: Path, records: Sequence[Mapping[str, Any]]) -> ForcedEnd | None:
    """The rank that the others waited for, as the first of them said that ended because of it."""
    rank = next((record["hung"] for record in records if record.get("hung") is not None), None)
    beat = next((beat for beat in read_heartbeats(logs) if beat.rank == rank), None)
    return ForcedEnd("hung", beat) if beat else None


def _shrunk(plan: RunPlan, verdict: Verdict) -> Verdict:
    smaller = with_smaller_micro(plan)
    if smaller is None:
        return verdict
    replace_plan(smaller)
    return Verdict(verdict.word, verdict.code, f"{verdict.why}, with {smaller.chosen('batch.micro')}")


def _check_job(plan: RunPlan, environment: Mapping[str, str]) -> None:
    """Refuses a job of another size than the plan's."""
    topology = plan.topology
    nodes = int(environment["SLURM_NNODES"])
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    asked = f"--nodes={topology.num_nodes}"
    if topology.device == "cuda":
        asked += f" --gpus-per-node={topology.processes_per_node}"
        if (nodes, gpus) == (topology.num_nodes, topology.processes_per_node):
            return
    elif nodes == topology.num_nodes:
        return
    raise UserError(
        f"the plan is for {topology.num_nodes} nodes x {topology.processes_per_node} processes on {topology.device};"
        f" the job has {nodes} nodes x {gpus} GPUs.",
        "each process trains on its share of the packs, on a device of its own.",
        f"sbatch {asked} …, or plan it anew: packhorse plan RECIPE --gpus {nodes * gpus} --nodes {nodes} --write",
    )


def _threads(plan: RunPlan, environment: Mapping[str, str]) -> int:
    """CPU threads of each rank: of the CPUs that the job has, as many as were planned at most."""
    cpus = int(environment.get("SLURM_CPUS_PER_TASK") or 1)
    return max(1, min(plan.topology.threads_per_process, cpus // plan.topology.processes_per_node))


def _refuse_more_in_vain(folder: Path, chain: str, most: int) -> None:
    """Slurm queues a job again by itself when a node is lost: whether that leads anywhere is seen here."""
    count = count_attempts_without_progress(folder, chain, newest_step(folder))
    if count < most:
        return
    now = read_status(folder)
    fact = f"the last {count} attempts of {relative(folder)} gained no step."
    if now is not None:
        told = Status(state="failed", step=now.step, num_steps=now.num_steps, attempt=now.attempt, message=fact)
        write_status(folder, told)
    raise UserError(
        fact,
        f"the site allows {most} in a row (attempts_without_progress); another would take the nodes for as little.",
        f"see `packhorse status {relative(folder)}`, then go on with: packhorse resume {relative(folder)}",
        exit_code=EXIT_IN_VAIN,
    )


def _take_stop_away(folder: Path) -> None:
    """A request of a job script that no rank lived to see; one by hand is empty, and stands."""
    stop = folder / STOP_FILE
    if stop.is_file() and stop.read_text(encoding="utf-8").startswith("job "):
        stop.unlink(missing_ok=True)


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Reads the words of the job script; answers on standard output, tells people on standard error."""
    try:
        match words:
            case ["begin", run, most]:
                sys.stdout.write("\n".join(begin(run, int(most), environment)) + "\n")
            case ["end", run, most, code, asked, ended]:
                verdict = end(run, int(most), int(code), Asked(asked == "yes", ended == "yes"), environment)
                sys.stderr.write(f"{time.strftime('%H:%M:%S')} {verdict.why}\n")
                sys.stdout.write(f"{verdict.word} {verdict.code}\n")
            case ["followed", run, job]:
                followed(run, job, environment)
            case _:
                sys.stderr.write(__doc__ or "")
                return 2
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
