"""One process of a run: reads plan.json and the prepared data, trains, and leaves a record of how it ended."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from packhorse.data.packs.store import PackStore, open_store
from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, UserError
from packhorse.model.parameters import count_parameters, trained_kinds
from packhorse.model.sequence import SequenceGroup, join_sequence_group
from packhorse.plan.command import nvme_folder, with_local_nvme
from packhorse.plan.run_plan import DataFacts, RunPlan, read_plan
from packhorse.run_folder.status import State
from packhorse.track.meter import Figures, Meter, evaluation_figures
from packhorse.train.checkpoint.checkpoints import Checkpoints, checkpoint_to_resume, newest_state
from packhorse.train.checkpoint.weights import publish_result
from packhorse.train.engine.engine import GROUP_TIMEOUT, Engine, start_accelerator, start_engine
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.engine.precision import set_matmul_precision
from packhorse.train.evaluate import validation_loss
from packhorse.train.guard.memory_error import is_out_of_memory, memory_error
from packhorse.train.guard.step_guard import Numbers
from packhorse.train.loop import Run, train
from packhorse.train.probe import probe
from packhorse.train.ranks.agreement import Agreement, stopped
from packhorse.train.ranks.another_attempt import AnotherAttempt
from packhorse.train.ranks.attempt import Attempt, open_attempt
from packhorse.train.ranks.identity import own_rank
from packhorse.train.ranks.signals import Stopped, StopRequest
from packhorse.train.report import Reporter, tell
from packhorse.train.setup import step_loader, training_model
from packhorse.train.state import TrainState


def run_worker(plan_file: Path, signals: StopRequest) -> int:
    """Trains one rank's share of the plan; returns the exit code.

    What ends the process is also written to RUN/logs/attempt-N/rank-R.json: exit codes do not survive the agent that
    accelerate starts the ranks with.
    """
    # A run folder that was moved or copied is the record of its own run, wherever the plan says it was made.
    plan = read_plan(plan_file).model_copy(update={"run_folder": str(plan_file.absolute().parent)})
    attempt = open_attempt(Path(plan.run_folder), signals)
    attempt.watch_others(plan.topology.world_size, plan.recipe.recovery.hang_seconds)
    message, again = "", None
    try:
        code = _work(plan, attempt)
    except Stopped:
        code, message = EXIT_STOPPED, "stopped before the first step"
    except Exception as error:
        told = memory_error(plan, attempt.pulse.last, error) if is_out_of_memory(error) else error
        code, message = EXIT_BUG, traceback.format_exc()
        if isinstance(told, UserError):
            code, message = told.exit_code, str(told)
        again = told.again if isinstance(told, AnotherAttempt) else None
    if code == EXIT_STOPPED and again is None:
        stopped(Path(plan.run_folder))
    attempt.record(code, message, again)
    if message:
        state = newest_state(Path(plan.run_folder))
        what: State = "stopped" if code == EXIT_STOPPED else "failed"
        with suppress(OSError):  # a full disk takes no status either; the launcher reads the record
            tell(plan, what, state, attempt.number, _headline(message))
    if code not in (EXIT_OK, EXIT_STOPPED) or message:
        # Other ranks may wait for this one in a collective; destroying the group in order would wait for them.
        os._exit(code)
    attempt.pulse.close()
    return code


def _headline(message: str) -> str:
    """A user error's fact, or a traceback's last line."""
    lines = message.strip().splitlines()
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _work(plan: RunPlan, attempt: Attempt) -> int:
    plan = with_local_nvme(plan)
    attempt.pulse.phase("load")
    torch.set_num_threads(plan.topology.threads_per_process)
    set_matmul_precision(plan.recipe.tf32)
    accelerator = start_accelerator(plan)
    rank = own_rank()
    quiet_libraries(is_main=rank == 0)
    data = _data(plan)
    checkpoint, state = checkpoint_to_resume(Path(plan.run_folder), is_main=rank == 0)
    attempt.begins_at(state.step)
    if rank == 0:
        tell(plan, "starting", state, attempt.number)
    tokenizer = tokenizer_of(plan.recipe, Path(data.tokenizer))
    model = training_model(plan, tokenizer, accelerator.device, checkpoint, attempt.loads_on)
    count = count_parameters(model)
    logging.info("trained: %s", "; ".join(str(kind) for kind in trained_kinds(model)))
    optimizer = make_optimizer(model, plan.recipe)
    engine = start_engine(accelerator, plan, model, optimizer)
    if isinstance(optimizer, InBackwardOptimizer):
        optimizer.step_in_backward()
    with ExitStack() as lifetimes:
        reporter = Reporter(plan, state, attempt.number, is_main=rank == 0)
        lifetimes.callback(reporter.close)
        run = _assemble(plan, engine, state, attempt, reporter, rank)
        lifetimes.callback(run.loader.close)
        if checkpoint:
            run.checkpoints.load_optimizer(checkpoint)
        sizes: Figures = {"model/num_parameters": count.total, "model/num_trainable": count.trainable}
        _look_before(run, state, sizes)
        state = train(run, state)
        code = _end(run, state, tokenizer)
    # Last: a rank that has ended may be the reason for a job to end the others, and rank 0 has trackers to close.
    engine.close()
    offloaded = nvme_folder(plan)
    if offloaded is not None:
        # Every rank of a node tries; none reads it any more.
        shutil.rmtree(offloaded, ignore_errors=True)
    return code


def _assemble(plan: RunPlan, engine: Engine, state: TrainState, attempt: Attempt, reporter: Reporter, rank: int) -> Run:
    agreement = Agreement(attempt.signals, Path(plan.run_folder), is_main=rank == 0)
    sequence = join_sequence_group(plan.topology.sequence, GROUP_TIMEOUT)
    loader = step_loader(plan, rank, pinned=engine.device.type == "cuda")
    checkpoints = Checkpoints(plan, engine, rank == 0, partial(attempt.pulse.phase, "save"))
    return Run(
        plan=plan,
        engine=engine,
        loader=loader,
        sequence=sequence,
        meter=Meter(state.num_supervised_tokens, state.elapsed_seconds),
        checkpoints=checkpoints,
        agreement=agreement,
        numbers=Numbers(plan, engine, loader, sequence, rank == 0, checkpoints.finish),
        pulse=attempt.pulse,
        evaluate=_evaluation(plan, engine, rank, sequence, partial(agreement.go_on, engine)),
        reporter=reporter,
        rank=rank,
    )


def _evaluation(
    plan: RunPlan, engine: Engine, rank: int, sequence: SequenceGroup | None, go_on: Callable[[], None]
) -> Callable[[], float] | None:
    try:
        store: PackStore = open_store(Path(_data(plan).folder), "validation")
    except FileNotFoundError:
        return None
    ranks, micro = plan.topology.data_ranks, plan.batch.micro_packs
    data_rank = rank // plan.topology.sequence
    return partial(validation_loss, engine, engine.model, store, micro, data_rank, ranks, sequence, go_on)


def _look_before(run: Run, state: TrainState, sizes: Figures) -> None:
    """Proves that packing changes nothing, and measures where training starts from."""
    store = open_store(Path(_data(run.plan).folder), "train")
    run.agreement.go_on(run.engine)
    figures = sizes | probe(run.engine, run.engine.model, store, run.plan.recipe.precision, run.sequence).figures()
    if state.step == 0 and run.evaluate:
        run.pulse.phase("evaluate", 0)
        figures |= evaluation_figures(run.evaluate())
    run.reporter.begin(state, figures)


def _end(run: Run, state: TrainState, tokenizer: PreTrainedTokenizerBase) -> int:
    run.pulse.phase("save", state.step)
    run.checkpoints.finish()
    for name, value in run.checkpoints.take_figures().items():
        logging.info("%s %.3f", name, value)  # there is no later line of figures
    finished = state.step == run.plan.num_steps and state.held_back is None
    if finished:
        publish_result(run.plan, run.engine, tokenizer, is_main=run.rank == 0)
    run.reporter.tell("finished" if finished else "stopped", state)
    return EXIT_OK if finished else EXIT_STOPPED


def _data(plan: RunPlan) -> DataFacts:
    assert plan.data is not None, "a plan is only run once its data is prepared"
    return plan.data


def quiet_libraries(is_main: bool) -> None:
    """Lets only the main rank talk, and the libraries only of errors."""
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "DeepSpeed", "accelerate", "wandb", "filelock", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
