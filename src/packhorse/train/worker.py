"""One process of a run: reads plan.json and the prepared data, trains, and leaves a record of how it ended."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from packhorse.data.batches import BatchPlan
from packhorse.data.loader import PackLoader
from packhorse.data.render import load_tokenizer
from packhorse.data.store import PackStore, open_store
from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from packhorse.model.adapters import count_parameters
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.plan.status import State, Status, write_status
from packhorse.track.meter import Figures, Meter, evaluation_figures
from packhorse.track.progress import Progress, open_progress
from packhorse.track.sinks import MetricsFile, Sinks
from packhorse.track.trackers import open_trackers
from packhorse.train.checkpoint import (
    Checkpoints,
    complete_checkpoints,
    publish_folder,
    read_state,
    weights_folder_name,
)
from packhorse.train.engine import Engine, start_accelerator, start_engine
from packhorse.train.evaluate import validation_loss
from packhorse.train.loop import Run, train
from packhorse.train.optimizer import make_optimizer
from packhorse.train.probe import probe
from packhorse.train.setup import training_model
from packhorse.train.signals import StopBeforeTraining, StopRequest
from packhorse.train.state import TrainState
from packhorse.train.weights import gather_trainable, save_weights, unwrapped

logger = logging.getLogger(__name__)

ATTEMPT_VARIABLE = "PACKHORSE_ATTEMPT"


def run_worker(plan_file: Path) -> int:
    """Trains one rank's share of the plan; returns the exit code.

    What ends the process is also written to RUN/logs/attempt-N/rank-R.json: exit codes do not survive the agent that
    accelerate starts the ranks with.
    """
    plan = read_plan(plan_file)
    stop = StopRequest()
    stop.install()
    attempt = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
    logs = Path(plan.run_folder) / "logs" / f"attempt-{attempt}"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        code, message = _work(plan, stop, attempt), ""
    except StopBeforeTraining:
        code, message = EXIT_STOPPED, "stopped before the first step"
        _tell(plan, "stopped", TrainState(), attempt, message)
    except UserError as error:
        code, message = EXIT_USER_ERROR, str(error)
    except Exception:
        code, message = EXIT_BUG, traceback.format_exc()
    rank = int(os.environ.get("RANK", "0"))
    record = {"rank": rank, "time": time.time(), "exit_code": code, "message": message}
    (logs / f"rank-{rank}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if message:
        sys.stderr.write(f"rank {rank}: {message}\n")
        sys.stderr.flush()
    if code in (EXIT_USER_ERROR, EXIT_BUG):
        # Other ranks may wait for this one in a collective; destroying the group in order would wait for them.
        os._exit(code)
    return code


def _work(plan: RunPlan, stop: StopRequest, attempt: int) -> int:
    torch.set_num_threads(plan.topology.threads_per_process)
    accelerator = start_accelerator(plan)
    rank, world = _rank_and_world()
    is_main = rank == 0
    _quiet(is_main)
    assert plan.data is not None
    checkpoint = next(reversed(complete_checkpoints(Path(plan.run_folder) / "checkpoints")), None)
    state = read_state(checkpoint) if checkpoint else TrainState()
    if is_main:
        _tell(plan, "starting", state, attempt)
    tokenizer = load_tokenizer(Path(plan.data.tokenizer), plan.recipe.data.template)
    model = training_model(plan, tokenizer, accelerator.device, checkpoint)
    count = count_parameters(model)
    engine = start_engine(accelerator, plan, model, make_optimizer(model, plan.recipe.optimizer))
    store = open_store(Path(plan.data.folder), "train")
    with ExitStack() as lifetimes:
        checkpoints = Checkpoints(plan, engine, is_main)
        if checkpoint:
            checkpoints.load_optimizer(checkpoint)
        reporter = _Reporter(plan, state, attempt) if is_main else None
        if reporter:
            lifetimes.callback(reporter.close)
        report = probe(engine, engine.model, store, plan.recipe.precision)
        loader = PackLoader(
            store=store,
            batch_plan=BatchPlan(store.pack_costs, plan.batch.packs_per_step, plan.recipe.seed),
            rank=rank,
            world_size=world,
            accumulation_steps=plan.batch.accumulation_steps,
            device_pin=engine.device.type == "cuda",
        )
        lifetimes.callback(loader.close)
        run = Run(
            plan=plan,
            engine=engine,
            loader=loader,
            meter=Meter(state.num_supervised_tokens, state.elapsed_seconds),
            checkpoints=checkpoints,
            stop=stop,
            evaluate=_evaluation(plan, engine, rank, world),
            report=reporter.report if reporter else _ignore,
            rank=rank,
        )
        first: Figures = {
            **report.figures(),
            "model/num_parameters": count.total,
            "model/num_trainable": count.trainable,
        }
        if state.step == 0 and run.evaluate:
            loss = run.evaluate()
            state = state.evaluated(loss)
            first |= evaluation_figures(loss)
        if reporter and state.step == 0:
            reporter.begin(state, first)
        stop.begin_training()
        state = train(run, state)
        finished = state.step == plan.num_steps
        if finished:
            _save_result(plan, engine, tokenizer, is_main)
    if is_main:
        _tell(plan, "finished" if finished else "stopped", state, attempt)
    engine.close()
    return EXIT_OK if finished else EXIT_STOPPED


def _rank_and_world() -> tuple[int, int]:
    # Not from the Accelerator: under DeepSpeed on the CPU it may be wrong on every rank.
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _quiet(is_main: bool) -> None:
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "DeepSpeed", "accelerate", "wandb", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _evaluation(plan: RunPlan, engine: Engine, rank: int, world: int) -> Any:  # noqa: ANN401
    assert plan.data is not None
    try:
        store: PackStore = open_store(Path(plan.data.folder), "validation")
    except FileNotFoundError:
        return None
    return partial(validation_loss, engine, engine.model, store, plan.batch.micro_packs, rank, world)


def _save_result(plan: RunPlan, engine: Engine, tokenizer: Any, is_main: bool) -> None:  # noqa: ANN401
    """RUN/model or RUN/adapter: what `from_pretrained` reads, in the type that training computed in."""
    weights = gather_trainable(engine, is_main)
    if not is_main:
        return
    name = weights_folder_name(plan)
    target = Path(plan.run_folder) / name
    temporary = target.with_name(f".{name}.tmp")
    dtype = torch.bfloat16 if plan.recipe.precision == "bf16" and name == "model" else None
    save_weights(unwrapped(engine), weights, temporary, dtype)
    tokenizer.save_pretrained(temporary)
    publish_folder(temporary, target)


class _Reporter:
    """Rank 0's voice: metrics file, trackers, progress bar, status file."""

    def __init__(self, plan: RunPlan, state: TrainState, attempt: int) -> None:
        folder = Path(plan.run_folder)
        self._plan, self._attempt = plan, attempt
        first = state.step + 1 if state.step else 0
        self._sinks = Sinks([MetricsFile(folder / "metrics.jsonl", first), *open_trackers(plan.recipe, folder, first)])
        assert plan.num_steps is not None
        self._progress: Progress = open_progress(Console(), plan.num_steps, state.step)

    def begin(self, state: TrainState, figures: Figures) -> None:
        self._sinks.log(state.step, figures)
        _tell(self._plan, "training", state, self._attempt)

    def report(self, state: TrainState, figures: Figures) -> None:
        self._sinks.log(state.step, figures)
        self._progress.update(state.step, figures)
        _tell(self._plan, "training", state, self._attempt)

    def close(self) -> None:
        self._progress.close()
        self._sinks.close()


def _ignore(state: TrainState, figures: Figures) -> None:
    """Ranks other than 0 report nothing."""


def _tell(plan: RunPlan, state: State, at: TrainState, attempt: int, message: str = "") -> None:
    status = Status(state=state, step=at.step, num_steps=plan.num_steps or 0, attempt=attempt, message=message)
    write_status(Path(plan.run_folder), status)
