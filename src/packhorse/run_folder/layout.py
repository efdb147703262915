"""Names of all files and folders of a run. No other module spells one; this module imports nothing of Packhorse.

RUN/
    recipe.yaml  plan.json  plan-N.json  data.json  base.json
    site.json                                                       what is to be done
    status.json  metrics.jsonl  attempts.jsonl  skipped_steps.json  what was done
    evaluation.json  evaluation-test.json  wandb_id.txt  mlflow_id.txt
    report.html  report.json
    evaluation/
        rows.parquet  test-rows.parquet                             values and answers of each row
        answers.jsonl                                               answers that need not be generated again
        ranks/                                                      a launch of processes that measure
            plan.json  request.json  work.npz  measured.json  failure-R.json  stderr.log
        judge.jsonl                                                 replies of a judge that need not be paid again
        ratings.jsonl                                               ratings by people
    launcher.lock  STOP  CHECKPOINT  CANCEL                         who runs it, and requests to it
    jobs.jsonl  ended.jsonl  job.sbatch  KIND.sbatch                its Slurm jobs
    logs/
        KIND-JOB.out
        attempt-N/                                                  one launch of the run
            began.json  stderr.log  hang-report-requested
            heartbeat-R.json  rank-R.json  rank-R.log  stacks-R.txt  collectives-R.json
    checkpoints/
        step-000100/
            manifest.json  state.json  optimizer.json  optimizer-RRRRR-NNN.safetensors
            model/ or adapter/
        .step-000100.tmp/                                           a checkpoint that is being written
            .written-R.json
        .step-000100.removed/                                       a checkpoint that is being removed
        step-000100.damaged-K/                                      kept to be looked at; not a checkpoint
    profile/                                                        traces of `track.profile`
        steps-A-B-rank-R.json.gz  steps-A-B-rank-R.memory.pickle
    model/ or adapter/                                              the trained weights
        result.json                                                 the step that they are of
    export/                                                         the model in other forms
        merged/                                                     adapter and base as one model, with merge.json
        gguf/ NAME-TYPE.gguf  gguf.json  Modelfile
RUNS/.compiled/                                                     code that torch.compile made, for all runs
RUNS/.mlflow/                                                       figures of all runs with `track.mlflow`
RUNS/NAME/                                                          a sweep; its runs are RUNS/NAME-1, RUNS/NAME-2 ...
    sweep.json  recipe.yaml  sweep-evaluation.json  logs/
"""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Final

COMPILED_FOLDER: Final = ".compiled"
RUNS_FOLDER: Final = "runs"
"""Folder in which a run is looked up by its name."""

# What is to be done
RECIPE_FILE: Final = "recipe.yaml"
PLAN_FILE: Final = "plan.json"
REPLACED_PLANS: Final = "plan-*.json"
"""Plans that were replaced, counted from 1."""
DATA_FILE: Final = "data.json"
"""Copy of the manifest of the prepared data."""
BASE_FILE: Final = "base.json"
"""Fingerprints of the weights that the run was trained from."""
SITE_RECORD: Final = "site.json"
"""Site profile with which the run was submitted."""
SWEEP_FILE: Final = "sweep.json"
"""Replaces plan.json in the folder of a sweep."""
SWEEP_EVALUATION_FILE: Final = "sweep-evaluation.json"
"""Result of `packhorse evaluate` on a sweep, in its folder."""

# What was done
STATUS_FILE: Final = "status.json"
METRICS_FILE: Final = "metrics.jsonl"
ATTEMPTS_FILE: Final = "attempts.jsonl"
SKIPPED_STEPS_FILE: Final = "skipped_steps.json"
SKIPPED_STEPS_FILE_BEFORE: Final = "left_out.json"
"""Earlier name of SKIPPED_STEPS_FILE; still read."""
EVALUATION_FILE: Final = "evaluation.json"
TEST_EVALUATION_FILE: Final = "evaluation-test.json"
EVALUATION_FOLDER: Final = "evaluation"
ROWS_FILE: Final = "rows.parquet"
ANSWERS_FILE: Final = "answers.jsonl"
RANKS_FOLDER: Final = "ranks"
"""Folder of a launch of processes that measure, removed when it has succeeded."""
REQUEST_FILE: Final = "request.json"
WORK_FILE: Final = "work.npz"
MEASURED_FILE: Final = "measured.json"
FAILURES: Final = "failure-*.json"
JUDGE_FILE: Final = "judge.jsonl"
RATINGS_FILE: Final = "ratings.jsonl"
TEST_ROWS_FILE: Final = "test-rows.parquet"
REPORT_FILE: Final = "report.html"
REPORT_FIGURES_FILE: Final = "report.json"
"""Figures of the report."""
WANDB_ID_FILE: Final = "wandb_id.txt"
MLFLOW_ID_FILE: Final = "mlflow_id.txt"
MLFLOW_FOLDER: Final = ".mlflow"
"""MLflow's files for all runs, in the folder of the runs."""
MODEL_FOLDER: Final = "model"
ADAPTER_FOLDER: Final = "adapter"
EXPORT_FOLDER: Final = "export"
MERGE_FILE: Final = "merge.json"
"""Hashes and proof of a merged model, in its folder."""
RESULT_FILE: Final = "result.json"
"""In the folder of the trained weights: their step."""

# Who runs it, and requests to it: the ranks look for STOP and CHECKPOINT between two steps
LOCK_FILE: Final = "launcher.lock"
STOP_FILE: Final = "STOP"
"""Requests a checkpoint, then the end of the attempt."""
CHECKPOINT_FILE: Final = "CHECKPOINT"
"""Requests a checkpoint."""
CANCEL_FILE: Final = "CANCEL"
"""Says that no further job may resume the run."""

# Slurm jobs
JOBS_FILE: Final = "jobs.jsonl"
ENDED_FILE: Final = "ended.jsonl"
"""How the jobs that do not train ended."""
JOB_LOGS: Final = "*.out"
ARRAY_JOB_LOG: Final = "job-%A_%a.out"
"""Log of one task of a job array; Slurm replaces `%A` and `%a` by the numbers of the array and the task."""

# Logs
LOGS_FOLDER: Final = "logs"
ATTEMPT_FOLDERS: Final = "attempt-*"
BEGAN_FILE: Final = "began.json"
STDERR_LOG: Final = "stderr.log"
"""Standard error of `accelerate launch`."""
REPORT_REQUEST_FILE: Final = "hang-report-requested"
"""Created before a hang is ended; each rank then writes its stacks and collectives."""
HEARTBEATS: Final = "heartbeat-*.json"
RANK_RECORDS: Final = "rank-*.json"
RANK_LOGS: Final = "rank-*.log"
COLLECTIVES: Final = "collectives-*.json"
STACKS: Final = "stacks-*.txt"

# Profile
PROFILE_FOLDER: Final = "profile"
TRACE: Final = re.compile(r"steps-(\d+)-(\d+)-rank-(\d+)\.json\.gz")

# Checkpoints
CHECKPOINTS_FOLDER: Final = "checkpoints"
STEP_FOLDERS: Final = "step-*"
STEP_FOLDER: Final = re.compile(r"step-(\d{6,})")
UNFINISHED_STEP_FOLDERS: Final = f".{STEP_FOLDERS}.tmp"
REMOVED_STEP_FOLDERS: Final = f".{STEP_FOLDERS}.removed"
MANIFEST_FILE: Final = "manifest.json"
WRITTEN_LISTS: Final = ".written-*.json"
"""Lists of the files that each rank has written into an unfinished checkpoint."""
STATE_FILE: Final = "state.json"
"""Step and counters."""
OPTIMIZER_FILE: Final = "optimizer.json"
"""Optimizer states that are not tensors."""
OPTIMIZER_TENSORS: Final = "optimizer-*.safetensors"


def numbered(pattern: str, number: int) -> str:
    """Return a name of this module with its `*` replaced by the number of an attempt, a rank or an earlier plan."""
    return pattern.replace("*", str(number))


def first_free(folder: Path, pattern: str) -> Path:
    """Return the first path of `numbered` names in a folder, counted from 1, that does not exist."""
    return next(path for number in count(1) if not (path := folder / numbered(pattern, number)).exists())


def job_log_name(kind: str) -> str:
    """Return the name of a job's log; Slurm replaces `%j` by the job's number."""
    return f"{kind}-%j.out"


def job_logs(run_folder: Path) -> list[Path]:
    """Return the logs of the run's jobs, the newest last."""
    return sorted((run_folder / LOGS_FOLDER).glob(JOB_LOGS), key=lambda path: path.stat().st_mtime)


def attempt_logs(run_folder: Path, attempt: int) -> Path:
    """Return the log folder of an attempt."""
    return run_folder / LOGS_FOLDER / numbered(ATTEMPT_FOLDERS, attempt)


def attempt_numbers(run_folder: Path) -> list[int]:
    """Return the numbers of the attempts that have a log folder, in order."""
    folders = (run_folder / LOGS_FOLDER).glob(ATTEMPT_FOLDERS)
    return sorted(int(folder.name.removeprefix("attempt-")) for folder in folders)


def trace_path(run_folder: Path, first: int, last: int, rank: int) -> Path:
    """Return the path of the profiler's trace of some steps of a rank."""
    return run_folder / PROFILE_FOLDER / f"steps-{first}-{last}-rank-{rank}.json.gz"


def memory_snapshot_path(trace: Path) -> Path:
    """Return the path of the GPU's memory history of the same steps and rank as a trace."""
    return trace.with_name(trace.name.replace(".json.gz", ".memory.pickle"))


def step_folder_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:06d}"


def unfinished_step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of a step is written."""
    return checkpoints / f".{step_folder_name(step)}.tmp"


def removed_step_folder(checkpoint: Path) -> Path:
    """Return the folder to which a checkpoint is renamed before its files are removed."""
    return checkpoint.with_name(f".{checkpoint.name}.removed")


def optimizer_tensors_name(rank: int, number: int) -> str:
    """Return the name of file `number`, counted from 0, of the optimizer states that a rank writes."""
    return f"optimizer-{rank:05d}-{number:03d}.safetensors"
