"""One of the processes that measure the models of a run together: reads the request, measures, and rank 0 writes."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import torch

from packhorse.data.render.tokenizer import read_tokenizer, tokenizer_of
from packhorse.errors import EXIT_BUG, EXIT_MEMORY, EXIT_OK, UserError
from packhorse.evaluate.answer_cache import AnswerCache
from packhorse.evaluate.distributed.exchange import read_request, write_measured
from packhorse.evaluate.distributed.placed import evaluated_model
from packhorse.evaluate.measure import Measured, measure
from packhorse.evaluate.models import BASE, TUNED
from packhorse.evaluate.ranks import Ranks
from packhorse.plan.command import with_local_nvme
from packhorse.plan.evaluation import shards_weights
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.run_folder.layout import FAILURES, numbered
from packhorse.train.engine.engine import shard_for_evaluation, start_accelerator
from packhorse.train.engine.process_group import control_group, own_rank, world_size
from packhorse.train.guard.memory_error import is_out_of_memory
from packhorse.train.worker import quiet_libraries


def run_worker(plan_file: Path) -> int:
    """Measure this rank's share of the request beside the plan; return the exit code.

    An error is written to failure-R.json: accelerate's agent, which starts the ranks, does not pass it on.
    """
    plan, folder, rank = read_plan(plan_file), plan_file.parent, int(os.environ.get("RANK", "0"))
    try:
        _measure(plan, folder)
    except Exception as error:
        shown = _out_of_memory(plan, rank, error) if is_out_of_memory(error) else error
        record = {"rank": rank, "message": traceback.format_exc(), "mistake": None}
        if isinstance(shown, UserError):
            mistake = shown.mistakes[0]
            record["mistake"] = [mistake.fact, mistake.why, mistake.fix, mistake.where, shown.exit_code]
        (folder / numbered(FAILURES, rank)).write_text(json.dumps(record), encoding="utf-8")
        # Other ranks may wait for this one in a collective; destroying the group in order would wait for them.
        os._exit(EXIT_BUG)
    return EXIT_OK


def _measure(launched: RunPlan, folder: Path) -> None:
    launched = with_local_nvme(launched)
    run = read_plan(Path(launched.run_folder)).model_copy(update={"run_folder": launched.run_folder})
    request, work = read_request(folder)
    torch.set_num_threads(launched.topology.threads_per_process)
    accelerator = start_accelerator(launched)
    rank = own_rank()
    quiet_libraries(is_main=rank == 0)
    assert run.data is not None
    trained = tokenizer_of(run.recipe, Path(run.data.tokenizer))
    tokenizer = read_tokenizer(Path(request.tokenizer)) if request.tokenizer else trained
    device: torch.device = accelerator.device
    in_step = shards_weights(launched.topology.engine)
    ranks = Ranks(rank, world_size(), in_step, device, control_group())
    cache = AnswerCache(Path(request.answers), is_read_only=rank != 0)
    *others, name = request.models
    model: Any = evaluated_model(run, launched, trained, len(tokenizer), device, name)
    # Kept until the end: DeepSpeed gathers the weights in it.
    _wrapped = shard_for_evaluation(accelerator, launched, model)

    def measured(name: str) -> list[Measured]:
        return measure(model, tokenizer, work, cache=cache, weights=request.models[name], ranks=ranks)

    results = {}
    if others:
        assert (others, name) == ([BASE], TUNED), "only an adapter's base is measured with the tuned model"
        with model.disable_adapter():
            results[BASE] = measured(BASE)
    results[name] = measured(name)
    if rank == 0:
        write_measured(folder, results)
    if ranks.group is not None:
        torch.distributed.barrier(group=ranks.group)
        torch.distributed.destroy_process_group()


def _out_of_memory(plan: RunPlan, rank: int, error: Exception) -> UserError:
    ranks = plan.topology.world_size
    return UserError(
        f"rank {rank} of {ranks} ran out of memory: {str(error).splitlines()[0]}",
        "each rank holds its part of the weights, one gathered layer, and the keys and values of its answers.",
        f"measure with more GPUs, --ranks {2 * ranks}, or with shorter answers, evaluation.max_new_tokens.",
        exit_code=EXIT_MEMORY,
    )
