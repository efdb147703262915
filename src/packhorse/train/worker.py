"""One process of a run: reads plan.json and the prepared data, trains, and records how it ended."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import traceback
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.errors import EXIT_BUG, EXIT_LOST, EXIT_OK, EXIT_STOPPED, UserError
from packhorse.model.sequence import join_sequence_group
from packhorse.plan.command import nvme_folder, with_local_nvme
from packhorse.plan.run_plan import DataFacts, RunPlan, read_plan
from packhorse.recipe.objectives import DistilObjective as DistilSection
from packhorse.run_folder.base_weights import record_base
from packhorse.run_folder.status import State
from packhorse.track.meter import Figures, Meter
from packhorse.train.checkpoint.best import publish
from packhorse.train.checkpoint.checkpoints import Checkpoints
from packhorse.train.checkpoint.resume_point import checkpoint_to_resume, newest_state
from packhorse.train.compilation import watch_compilation
from packhorse.train.engine.engine import start_accelerator
from packhorse.train.engine.precision import set_matmul_precision, use_deterministic_kernels
from packhorse.train.engine.process_group import GROUP_TIMEOUT, own_rank
from packhorse.train.guard.memory_error import is_out_of_memory, memory_error
from packhorse.train.guard.step_guard import StepGuard
from packhorse.train.loop import TrainingRun, train
from packhorse.train.objectives.distil import distil_objectives
from packhorse.train.objectives.preference import make_objective
from packhorse.train.probe import probe
from packhorse.train.profiling import step_profiler
from packhorse.train.ranks.agreement import Agreement, remove_stop_request
from packhorse.train.ranks.attempt import AnotherAttempt, Attempt, open_attempt
from packhorse.train.ranks.signals import Stopped, StopRequest
from packhorse.train.reference import prove_reference
from packhorse.train.reporter import Reporter, write_run_status
from packhorse.train.setup import step_loader
from packhorse.train.start import Loaded, Start
from packhorse.train.state import TrainState
from packhorse.train.validation import validate


def run_worker(plan_file: Path, signals: StopRequest) -> int:
    """Train one rank's share of the plan, and return the exit code.

    The reason of the end is also written to RUN/logs/attempt-N/rank-R.json: accelerate's agent, which starts the ranks,
    does not pass their exit codes on.
    """
    # A run folder that was moved or copied records its own run, whatever path the plan was made with.
    plan = read_plan(plan_file).model_copy(update={"run_folder": str(plan_file.absolute().parent)})
    run_folder = Path(plan.run_folder)
    attempt = open_attempt(run_folder, signals)
    attempt.watch_others(plan.topology.world_size, plan.recipe.recovery.hang_seconds)
    message, again, hung = "", None, None
    try:
        code = _work(plan, attempt)
    except Stopped:
        code, message = EXIT_STOPPED, "stopped before the first step"
    except Exception as error:
        shown = memory_error(plan, attempt.pulse.last, error) if is_out_of_memory(error) else error
        code, message = EXIT_BUG, traceback.format_exc()
        if isinstance(shown, UserError):
            code, message = shown.exit_code, str(shown)
        elif found := attempt.hang_found_by_another():
            code, (message, hung) = EXIT_LOST, found
        again = shown.again if isinstance(shown, AnotherAttempt) else None
    if code == EXIT_STOPPED and again is None:
        remove_stop_request(run_folder)
    attempt.record(code, message, again, hung)
    if message:
        state = newest_state(run_folder)
        run_state: State = "stopped" if code == EXIT_STOPPED else "failed"
        with suppress(OSError):  # a full disk takes no status either; the launcher reads the record
            write_run_status(plan, run_state, state, attempt.number, _headline(message))
    if code not in (EXIT_OK, EXIT_STOPPED) or message:
        # Other ranks may wait for this one in a collective; destroying the group in order would wait for them.
        os._exit(code)
    attempt.pulse.close()
    return code


def _headline(message: str) -> str:
    """Return a user error's fact, or a traceback's last line."""
    lines = message.strip().splitlines()
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _work(plan: RunPlan, attempt: Attempt) -> int:
    plan = with_local_nvme(plan)
    # --- processes and libraries --------------------------------------------------------------
    attempt.pulse.phase("load")
    torch.set_num_threads(plan.topology.threads_per_process)
    set_matmul_precision(plan.recipe.tf32)
    use_deterministic_kernels(plan.recipe.deterministic)
    accelerator = start_accelerator(plan)
    rank = own_rank()
    quiet_libraries(is_main=rank == 0)
    # --- model, optimizer, engine -------------------------------------------------------------
    checkpoint, state = checkpoint_to_resume(Path(plan.run_folder), is_main=rank == 0)
    attempt.begins_at(state.step)
    if rank == 0:
        write_run_status(plan, "starting", state, attempt.number)
    tokenizer = tokenizer_of(plan.recipe, Path(_data(plan).tokenizer))
    agreement = Agreement(attempt.signals, Path(plan.run_folder), is_main=rank == 0)
    sequence = join_sequence_group(plan.topology.sequence, GROUP_TIMEOUT)
    start = Start(plan, attempt, accelerator, tokenizer, agreement, sequence, rank)
    loaded = start.load(checkpoint)
    if rank == 0:
        record_base(plan)
    engine, count = loaded.engine, loaded.count
    # --- training -----------------------------------------------------------------------------
    with ExitStack() as lifetimes:
        reporter = Reporter(plan, state, attempt.number, is_main=rank == 0)
        lifetimes.callback(reporter.close)
        if plan.compiles_layers:
            lifetimes.callback(watch_compilation(attempt.pulse))
        run = _assemble(start, loaded, state, reporter)
        lifetimes.callback(run.loader.close)
        profiler = step_profiler(plan, rank, engine.device)
        if profiler is not None:
            attempt.pulse.on_each_phase(profiler.phase)
        if checkpoint:
            run.checkpoints.load_optimizer(checkpoint)
        sizes: Figures = {"model/num_parameters": count.total, "model/num_trainable": count.trainable}
        _measure_before(run, loaded, start, state, sizes)
        state = train(run, state)
        if profiler is not None:
            profiler.close()
        code = _end(run, state, tokenizer)
    # Last: a rank that has ended may make the scheduler end the others, and rank 0 has trackers to close.
    engine.close()
    offloaded = nvme_folder(plan)
    if offloaded is not None:
        # Every rank of a node tries; no rank reads it any more.
        shutil.rmtree(offloaded, ignore_errors=True)
    return code


def _assemble(start: Start, loaded: Loaded, state: TrainState, reporter: Reporter) -> TrainingRun:
    plan, engine, rank, pulse = start.plan, loaded.engine, start.rank, start.attempt.pulse
    loader = step_loader(plan, rank, pinned=engine.device.type == "cuda", store=loaded.stores["train"])
    checkpoints = Checkpoints(plan, engine, rank == 0, partial(pulse.phase, "save"))
    objective = evaluated = make_objective(plan.recipe.objective)
    if isinstance(plan.recipe.objective, DistilSection):
        objective, evaluated = distil_objectives(plan.recipe.objective, loaded.teacher)
    evaluate = None
    if "validation" in loaded.stores:
        passes = start.passes(engine, loaded.stores["validation"], "evaluate")
        evaluate = partial(validate, engine, evaluated, passes, start.sequence)
    return TrainingRun(
        plan=plan,
        engine=engine,
        loader=loader,
        objective=objective,
        sequence=start.sequence,
        meter=Meter(state.num_supervised_tokens, state.elapsed_seconds, utilisation=partial(_utilisation, plan)),
        checkpoints=checkpoints,
        agreement=start.agreement,
        guard=StepGuard(plan, engine, loader, objective, start.sequence, rank == 0, checkpoints.finish),
        pulse=pulse,
        evaluate=evaluate,
        reporter=reporter,
        rank=rank,
    )


def _utilisation(plan: RunPlan, tokens_per_second: float) -> Figures:
    """Return MFU and HFU; nothing where the plan does not know the GPUs, as on a CPU."""
    flops = plan.predicted.flops if plan.predicted is not None else None
    return flops.utilisation(tokens_per_second / plan.topology.world_size) if flops is not None else {}


def _measure_before(run: TrainingRun, loaded: Loaded, start: Start, state: TrainState, sizes: Figures) -> None:
    """Prove that packing changes no loss, and measure the validation loss before the first step."""
    store = loaded.stores["train"]
    run.agreement.raise_if_stopped(run.engine)
    plan = run.plan
    report = probe(run.engine, store, run.objective, plan.recipe.precision, run.sequence, plan.compiles_layers)
    figures = sizes | report.figures()
    if state.step == 0 and loaded.reference is not None and loaded.reference.is_start:
        passes = start.passes(run.engine, store, "prior")
        figures |= prove_reference(loaded.reference, run.engine, run.objective, passes, run.sequence)
    if state.step == 0 and run.evaluate:
        run.pulse.phase("evaluate", 0)
        figures |= run.evaluate()
    run.reporter.begin(state, figures)


def _end(run: TrainingRun, state: TrainState, tokenizer: PreTrainedTokenizerBase) -> int:
    run.pulse.phase("save", state.step)
    run.checkpoints.finish()
    for name, value in run.checkpoints.take_figures().items():
        logging.info("%s %.3f", name, value)  # no report follows that could contain them
    finished = state.is_trained(run.plan)
    if finished and not run.plan.is_trial:
        publish(run.plan, run.engine, state, tokenizer, is_main=run.rank == 0)
    run.reporter.write_status("finished" if finished else "stopped", state, state.early_stop_words(run.plan))
    return EXIT_OK if finished else EXIT_STOPPED


def _data(plan: RunPlan) -> DataFacts:
    assert plan.data is not None, "a plan is only run once its data is prepared"
    return plan.data


def quiet_libraries(is_main: bool) -> None:
    """Let only the main rank log, and let libraries log only errors."""
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "DeepSpeed", "accelerate", "wandb", "filelock", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
