"""Python part of slurm/job.sbatch; `begin` and `end` run none of Slurm's programs, which a container may lack.

python -m packhorse.launching.slurm.in_job begin RUN MAX
    prints the number of the attempt, threads per rank and the arguments of the launch, one per line; or `finished`
python -m packhorse.launching.slurm.in_job end RUN MAX CODE TIME_NEARLY_OVER JOB_IS_ENDING
    prints the next action of the script, and its exit code
python -m packhorse.launching.slurm.in_job successor RUN JOB
    records the job that resumes the run if this one ends early, and makes waiting jobs depend on either
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from packhorse.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from packhorse.launching.local.outcome import Outcome, determine_outcome, newest_step, stopped_outcome
from packhorse.launching.local.watch import ForcedEnd, RankWatcher
from packhorse.launching.slurm.jobs import link_successor
from packhorse.launching.slurm.next_action import NextAction, RunHistory, SlurmSignals, decide
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
from packhorse.run_folder.layout import CANCEL_FILE, STOP_FILE, attempt_logs
from packhorse.run_folder.lock import lock_for_job, release_job_lock
from packhorse.run_folder.status import Status, read_status, write_status

EXIT_NO_PROGRESS: Final = 30
CHAIN_VARIABLE: Final = "PACKHORSE_CHAIN"
"""Number of the first job of a line of successors."""


def begin(run: str, max_without_progress: int, environment: Mapping[str, str]) -> list[str]:
    """Begin an attempt in this job.

    Args:
        run: Folder of the run.
        max_without_progress: Limit of consecutive attempts without progress.
        environment: Environment of the job.

    Returns:
        Number of the attempt, threads per rank, and the arguments of `accelerate launch`; only `finished` if the run
        is finished.

    Raises:
        UserError: The run is cancelled, has no prepared data, is held by another launcher, was planned for a job of
            another size, or makes no progress.
    """
    plan = open_run(run)
    folder = Path(plan.run_folder)
    status = read_status(folder)
    if status is not None and status.state == "finished":
        return ["finished"]
    if (folder / CANCEL_FILE).exists():
        raise UserError(
            f"{relative(folder)} was cancelled.",
            "a job that was queued before the cancellation still starts.",
            f"to resume the run: packhorse resume {relative(folder)}",
            exit_code=EXIT_STOPPED,
        )
    require_prepared_data(plan)
    _check_job_size(plan, environment)
    arguments = launch_argv(plan.topology, folder)[2:]
    if any("\n" in argument for argument in arguments):
        raise UserError(
            f"the path of the run or of Packhorse contains a line break: {relative(folder)!a}.",
            "the job script reads one argument per line.",
            "move it to a path without a line break.",
        )
    job, chain = environment["SLURM_JOB_ID"], environment[CHAIN_VARIABLE]
    lock_for_job(folder, job, chain)
    record_killed_attempts(folder)
    try:
        _require_progress(folder, chain, max_without_progress)
    except UserError:
        release_job_lock(folder, job)
        raise
    _remove_stop_of_job(folder)
    attempt, _ = next_attempt(folder, AttemptStart(started_at=time.time(), from_step=newest_step(folder), chain=chain))
    return [str(attempt), str(_threads_per_rank(plan, environment)), *arguments]


def end(
    run: str, max_without_progress: int, exit_code: int, signals: SlurmSignals, environment: Mapping[str, str]
) -> NextAction:
    """Record how the attempt ended, and return what the job script does next.

    Args:
        run: Folder of the run.
        max_without_progress: Limit of consecutive attempts without progress.
        exit_code: Exit code of srun.
        signals: Signals that Slurm sent to the script.
        environment: Environment of the job.
    """
    plan = open_run(run)
    folder, attempt = Path(plan.run_folder), int(environment[ATTEMPT_VARIABLE])
    logs = attempt_logs(folder, attempt)
    outcome = _outcome(plan, logs, attempt, exit_code, signals)
    end_attempt(folder, attempt, outcome_of(outcome.exit_code, outcome.again), outcome.headline, time.time())
    _remove_stop_of_job(folder)
    history = RunHistory(
        signalled=any(record.get("signalled") for record in read_rank_records(logs)),
        cancelled=(folder / CANCEL_FILE).exists(),
        num_without_progress=count_attempts_without_progress(folder, environment[CHAIN_VARIABLE], newest_step(folder)),
        max_without_progress=max_without_progress,
        attempts=read_attempts(folder),
    )
    decision = decide(outcome, signals, history)
    if outcome.again == "shrink" and decision.action == "again":
        decision = _with_smaller_micro_batch(plan, decision)
    if decision.action != "again":
        release_job_lock(folder, environment["SLURM_JOB_ID"])
    return decision


def record_successor(run: str, job_id: str, environment: Mapping[str, str]) -> None:
    """Record in RUN/jobs.jsonl the job that resumes the run if this one ends early, then link waiting jobs to it.

    Raises:
        UserError: There is no such run, or Slurm does not change a dependency.
    """
    folder = Path(open_run(run).run_folder)
    this_job = environment["SLURM_JOB_ID"]
    submitted = [record.argv for record in read_jobs(folder) if record.kind == "train"]
    by_hand = ("sbatch", "--parsable", str(shipped_path("slurm", "job.sbatch")), str(folder))
    record = JobRecord(
        job_id=job_id,
        kind="train",
        submitted_at=time.time(),
        argv=submitted[-1] if submitted else by_hand,
        goes_on_from=this_job,
    )
    append_job(folder, record)
    waiting = link_successor(folder, this_job, job_id)
    sys.stdout.write(f"jobs that now wait for {this_job} or {job_id}: {' '.join(waiting) or 'none'}\n")


def _outcome(plan: RunPlan, logs: Path, attempt: int, exit_code: int, signals: SlurmSignals) -> Outcome:
    status = read_status(Path(plan.run_folder))
    state = status.state if status is not None and status.attempt == attempt else None
    if status is not None and state == "finished":
        return Outcome(EXIT_OK, status.message, status.message)
    if signals.time_nearly_over and not read_heartbeats(logs):
        return stopped_outcome(plan, attempt, "stopped before the ranks had started")
    records = read_rank_records(logs)
    # srun may kill a rank that is about to exit, after rank 0 reported that all ranks have saved: no failure.
    failed = any(ended_early(record) and is_cause(record) for record in records)
    ending = None if state == "stopped" and not failed else _hung(logs, records) or RankWatcher(plan, logs).look()
    return determine_outcome(plan, logs, attempt, ending, exit_code)


def _hung(logs: Path, records: Sequence[Mapping[str, Any]]) -> ForcedEnd | None:
    """Return the hung rank that the first rank to give up named."""
    rank = next((record["hung"] for record in records if record.get("hung") is not None), None)
    beat = next((beat for beat in read_heartbeats(logs) if beat.rank == rank), None)
    return ForcedEnd("hung", beat) if beat else None


def _with_smaller_micro_batch(plan: RunPlan, decision: NextAction) -> NextAction:
    smaller = with_smaller_micro(plan)
    if smaller is None:
        return decision
    replace_plan(smaller)
    return NextAction(decision.action, decision.exit_code, f"{decision.reason}, with {smaller.chosen('batch.micro')}")


def _check_job_size(plan: RunPlan, environment: Mapping[str, str]) -> None:
    """Refuse a job with other nodes or GPUs than planned."""
    topology = plan.topology
    nodes = int(environment["SLURM_NNODES"])
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    options = f"--nodes={topology.num_nodes}"
    if topology.device == "cuda":
        options += f" --gpus-per-node={topology.processes_per_node}"
        if (nodes, gpus) == (topology.num_nodes, topology.processes_per_node):
            return
    elif nodes == topology.num_nodes:
        return
    raise UserError(
        f"the plan is for {topology.num_nodes} nodes x {topology.processes_per_node} processes on {topology.device};"
        f" the job has {nodes} nodes x {gpus} GPUs.",
        "each process trains on its share of the packs, on its own device.",
        f"sbatch {options} …, or plan it again: packhorse plan RECIPE --gpus {nodes * gpus} --nodes {nodes} --write",
    )


def _threads_per_rank(plan: RunPlan, environment: Mapping[str, str]) -> int:
    cpus = int(environment.get("SLURM_CPUS_PER_TASK") or 1)
    return max(1, min(plan.topology.threads_per_process, cpus // plan.topology.processes_per_node))


def _require_progress(folder: Path, chain: str, maximum: int) -> None:
    """Refuse another attempt after `maximum` without progress: Slurm requeues after a lost node without any limit."""
    count = count_attempts_without_progress(folder, chain, newest_step(folder))
    if count < maximum:
        return
    now = read_status(folder)
    fact = f"the last {count} attempts of {relative(folder)} made no progress."
    if now is not None:
        failed = Status(state="failed", step=now.step, num_steps=now.num_steps, attempt=now.attempt, message=fact)
        write_status(folder, failed)
    raise UserError(
        fact,
        f"the site allows {maximum} such attempts in a row (attempts_without_progress).",
        f"see `packhorse status {relative(folder)}`, then resume with: packhorse resume {relative(folder)}",
        exit_code=EXIT_NO_PROGRESS,
    )


def _remove_stop_of_job(folder: Path) -> None:
    """Remove a stop request that a job script wrote and no rank has read; a user's request is empty, and stays."""
    stop = folder / STOP_FILE
    if stop.is_file() and stop.read_text(encoding="utf-8").startswith("job "):
        stop.unlink(missing_ok=True)


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a request of the job script; answers go to standard output, messages for people to standard error."""
    try:
        match words:
            case ["begin", run, maximum]:
                sys.stdout.write("\n".join(begin(run, int(maximum), environment)) + "\n")
            case ["end", run, maximum, code, time_nearly_over, job_is_ending]:
                signals = SlurmSignals(time_nearly_over == "yes", job_is_ending == "yes")
                decision = end(run, int(maximum), int(code), signals, environment)
                sys.stderr.write(f"{time.strftime('%H:%M:%S')} {decision.reason}\n")
                sys.stdout.write(f"{decision.action} {decision.exit_code}\n")
            case ["successor", run, job_id]:
                record_successor(run, job_id, environment)
            case _:
                sys.stderr.write(__doc__ or "")
                return EXIT_USER_ERROR
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
