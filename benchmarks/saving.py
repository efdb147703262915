"""What a checkpoint costs the step loop: written beside training, against written while it waits.

    python benchmarks/saving.py [--saves 4] [--write]

The same model (135 million parameters, fp32, with AdamW's states: 1.6 GB a checkpoint) is saved with
`checkpoint.asynchronous` true and false, by the very code that a run saves with; between two saves the processes
multiply matrices and agree, as a step loop does. The stall is all that such a loop waits for a checkpoint; of a
synchronous one, everything. Bar: a tenth. The first save makes the room on the host, and is shown by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import lab_log
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan, write_plan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.load import load_recipe
from packhorse.train.checkpoint.checkpoints import Checkpoints
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.engine.sharding import Fsdp2, make_mesh
from packhorse.train.state import TrainState
from step_loop import HERE

RUNS = {"ddp × 1": ("ddp", 1), "ddp × 2": ("ddp", 2), "fsdp2 × 2": ("fsdp2", 2)}
MODEL = {
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
SMALL = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
DATA = DataFacts(
    folder="/", content_hash="0", tokenizer="", num_rows=1, num_packs=2, num_tokens=1, num_supervised_tokens=1, fill=1.0
)
MOST = 0.10
STEP_SIDE = 768
PACKAGES = ("torch", "transformers", "safetensors")


def main() -> int:
    """Measures, prints the table, and writes it down where asked to; 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each kind")
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    options = parser.parse_args()
    runs, model = (dict(RUNS), MODEL) if not options.smoke else ({"fsdp2 × 2": ("fsdp2", 2)}, MODEL | SMALL)
    if options.smoke:
        options.saves = 2
    rows, worst = [], 0.0
    for title, (engine, processes) in runs.items():
        at_once, beside = (_figures(engine, processes, options.saves, kind, model) for kind in (False, True))
        whole = median(figures["checkpoint/stall_seconds"] for figures in at_once)
        stalls = [figures["checkpoint/stall_seconds"] for figures in beside]
        stall, seconds = median(stalls[1:]), median(figures["checkpoint/seconds"] for figures in beside)
        worst = max(worst, stall / whole)
        rows.append(
            [title, f"{whole:.2f}", f"{stall:.2f}", f"{stall / whole:.1%}", f"{stalls[0]:.2f}", f"{seconds:.1f}"]
        )
        sys.stderr.write(f"{rows[-1]}\n")
    header = ("engine", "synchronous, s", "stall, s", "ratio", "first stall, s", "on disk after, s")
    text = (
        "Fresh Llama of 135 million parameters, AdamW, fp32, 1.6 GB a checkpoint, one thread a process; medians of"
        f" {options.saves} saves, of the stalls without the first. Bar: {MOST:.0%}.\n"
        f"{lab_log.machine(1, PACKAGES)}.\n\n" + lab_log.markdown_table(header, rows)
    )
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Saving: what a checkpoint costs the step loop", text)
    return int(worst > MOST and not options.smoke)


def _figures(
    engine: str, processes: int, saves: int, asynchronous: bool, model: dict[str, int]
) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as name:
        words = [f"runs_folder={name}", f"parallel.engine={engine}", f"parallel.processes={processes}"]
        words += [f"checkpoint.asynchronous={str(asynchronous).lower()}", "checkpoint.keep_last=1", "batch.packs=2"]
        plan = make_plan(load_recipe(str(HERE / "step_loop.yaml"), words), DeviceRequest(None), detect_hardware(), DATA)
        Path(plan.run_folder).mkdir()
        write_plan(plan, Path(plan.run_folder))
        mp.spawn(partial(_process, plan=plan, folder=name, saves=saves, model=model), nprocs=processes)
        figures: list[dict[str, float]] = json.loads((Path(name) / "figures.json").read_text(encoding="utf-8"))
        return figures


def _process(rank: int, plan: RunPlan, folder: str, saves: int, model: dict[str, int]) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    size = plan.topology.world_size
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), size, rank)
    engine = _trained(plan, model)
    checkpoints = Checkpoints(plan, engine, is_main=rank == 0)
    figures = []
    for number in range(1, saves + 1):
        checkpoints.save(TrainState(step=number))
        while not (saved := checkpoints.take_figures()):
            _step()
            done = engine.sum_over_ranks([float(checkpoints.pending_done())])[0] == size
            checkpoints.publish(done)
        figures.append(saved)
    if rank == 0:
        (Path(folder) / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _trained(plan: RunPlan, sizes: dict[str, int]) -> Engine:
    """A model whose optimizer has its states, as the plan's engine holds it."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
    if plan.topology.engine == "fsdp2":
        placement = Fsdp2(make_mesh(plan.topology, torch.device("cpu")), "fp32")
        for layer in model.model.layers:  # type: ignore[union-attr]
            placement.unit([layer], is_last=False)
        placement.root(model)
    optimizer = make_optimizer(model, plan.recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    accelerator: Any = SimpleNamespace(scaler=None, unwrap_model=lambda model: model, device=torch.device("cpu"))
    return Engine(accelerator, model, optimizer, 1.0, clip_norm=None, control=dist.new_group(backend="gloo"))


def _step() -> None:
    """A fifth of a second of what training does."""
    until = time.perf_counter() + 0.2
    matrix = torch.ones(STEP_SIDE, STEP_SIDE)
    while time.perf_counter() < until:
        matrix = matrix @ matrix / STEP_SIDE


if __name__ == "__main__":
    sys.exit(main())
