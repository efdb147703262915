"""The fullest moment of a run, by phase: the real worker on real packs, and what the plan said before.

On CUDA it is what torch's allocator counts (`torch.cuda.max_memory_allocated`). On a CPU, where no allocator counts,
tensors are counted as operators make them: that tries all of this but the reading itself.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from measured_memory import LivePeak, save_model
from packhorse.data.data_manifest import DataManifest, read_data_manifest
from packhorse.data.packs.store import open_store
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.measure.rank_tensors import weight_tensors
from packhorse.estimate.measure.rehearse import rank_environment
from packhorse.estimate.memory import MemoryEstimate
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.model_spec.configuration import published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan, read_plan, write_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.quickstart.files import materialise
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.heartbeat import HeartbeatWriter
from packhorse.train import start, worker
from packhorse.train.engine.engine import Engine, start_engine
from packhorse.train.ranks.signals import StopRequest
from prepared import write_prepared
from ranks import IMPORTED

STEPS = 2
SECONDS = 900
PEAKS = "peaks-{}.json"
SMALL = published()["Qwen/Qwen2.5-0.5B"]
LARGE = published()["meta-llama/Llama-3.2-1B"]


@dataclass(frozen=True)
class Case:
    """A run to measure.

    Attributes:
        name: For the table.
        config: Of the model, freshly made.
        method: As in the recipe.
        length: Tokens of a pack; two documents, 5/8 and 3/8 of it, all supervised.
        validation: Tokens of a pack that is evaluated on; None: as long.
        micro: Packs a pass.
        passes: Of a step.
        processes: A GPU each.
        sections: Others of the recipe.
    """

    name: str
    config: Any
    method: Any
    length: int
    validation: int | None = None
    micro: int = 1
    passes: int = 1
    processes: int = 1
    engine: str = "single"
    checkpointing: bool = False
    precision: str = "bf16"
    sections: dict[str, Any] = field(default_factory=dict)


def _alone() -> list[Case]:
    """Each for one card of 24 GB."""
    cases = []
    for method, config in (("full", SMALL), ("lora", LARGE), ("qlora", LARGE)):
        for length in (1024, 4096):
            for checkpointing in (False, True):
                name = f"{method}, {length:,}{', recomputed' if checkpointing else ''}"
                cases.append(Case(name, config, method, length, checkpointing=checkpointing))
    eight_bit = {"optimizer": {"name": "adamw_8bit", "learning_rate": 1e-4}}
    return [
        *cases,
        Case("full, 1,024, two passes of two", SMALL, "full", 1024, micro=2, passes=2),
        Case("full, 1,024, 8-bit Adam", SMALL, "full", 1024, sections=eight_bit),
        Case("lora, 16,384, recomputed: the loss in chunks", LARGE, "lora", 16_384, checkpointing=True),
        Case("qlora, 256, evaluated on 16,384", LARGE, "qlora", 256, validation=16_384, checkpointing=True),
    ]


def _together(processes: int) -> list[Case]:
    return [
        Case(f"{method}, 2,048, {engine}", config, method, 2048, processes=processes, engine=engine, checkpointing=True)
        for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
        for method, config in (("full", SMALL), ("lora", LARGE))
    ]


def cases_for(num_gpus: int) -> list[Case]:
    """What so many GPUs can measure."""
    return _alone() + (_together(num_gpus) if num_gpus > 1 else [])


@dataclass(frozen=True)
class Measured:
    """A case, measured.

    Attributes:
        estimate: What the plan says.
        phases: Bytes of the fullest moment of each phase, on the fullest rank.
    """

    case: Case
    estimate: MemoryEstimate
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.phases.values())

    @property
    def told(self) -> int:
        """What the plan counts of it."""
        return self.estimate.peak.bytes

    @property
    def gap(self) -> float:
        """Told over found, less one."""
        return self.told / self.peak - 1

    @property
    def row(self) -> tuple[str, ...]:
        """For a table."""
        fullest = max(self.phases, key=lambda name: self.phases[name])
        sizes = (f"{self.told / 2**30:,.2f}", f"{self.peak / 2**30:,.2f}", f"{self.gap:+.1%}")
        return (self.case.name, *sizes, self.estimate.peak.name, fullest)


HEADER = ("case", "told GiB", "found GiB", "gap", "told fullest in", "found in")


def measure(case: Case, folder: Path, gpus: Sequence[str]) -> Measured:
    """Runs a case in processes of their own.

    Args:
        case: What runs.
        folder: Bases are made here once for all cases, and the rest anew.
        gpus: Names of this machine's; empty: on the CPU.
    """
    plan, estimate = plan_of(case, folder, gpus)
    # A server that has imported all is quicker, and may have touched CUDA, which no fork survives.
    context = mp.get_context("spawn" if gpus else "forkserver")
    if not gpus:
        context.set_forkserver_preload(IMPORTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(case.processes):
        variables = rank_environment(plan, rank) | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, variables):  # before torch is imported there
            ranks.append(context.Process(target=_rank, args=(plan.run_folder, variables)))
            ranks[-1].start()
    for each in ranks:
        each.join(SECONDS)
        each.kill()
    found = [json.loads((Path(plan.run_folder) / PEAKS.format(r)).read_text("utf-8")) for r in range(case.processes)]
    return Measured(case, estimate, {name: max(each.get(name, 0) for each in found) for name in found[0]})


def base_folder(config: Any, folder: Path) -> Path:
    """Where the model of a case is made, once for all cases."""
    return folder / f"{config['model_type']}-{config['num_hidden_layers']}"


def plan_of(case: Case, folder: Path, gpus: Sequence[str]) -> tuple[RunPlan, MemoryEstimate]:
    """The plan, written to its run folder, and what it needs."""
    base = base_folder(case.config, folder)
    if not base.exists():
        save_model(base, dict(case.config), torch.bfloat16)
    mine = folder / case.name.replace(" ", "-").replace(",", "")
    data, validation = _packs(case, mine / "data", base.parent), case.validation or case.length
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "runs_folder": str(mine),
            "model": {"path": str(base), "tokenizer": "builtin:tokenizer"},
            "method": case.method,
            "data": {"sources": [{"path": "builtin:core.messages.jsonl"}]},
            "optimizer": {"learning_rate": 1e-4},
            "batch": {
                "length": max(case.length, validation),
                "packs": case.micro * case.passes * case.processes,
                "micro": case.micro,
            },
            "steps": STEPS,
            "precision": case.precision,
            "parallel": {"engine": case.engine, "processes": case.processes, "checkpointing": case.checkpointing},
            "evaluation": {"max_answered_rows": 0, "every_steps": 1},
            "track": {"wandb": "off"},
            **case.sections,
        }
    )
    plan = make_plan(recipe, DeviceRequest(), Hardware(os.cpu_count() or 1, tuple(gpus)), data)
    Path(plan.run_folder).mkdir(parents=True)
    write_plan(plan, Path(plan.run_folder))
    shape = read_shape(case.config)
    assert shape is not None
    figures = [_figures(mine / "data", split) for split in ("train", "validation")]
    basis = EstimateInputs(shape, figures[0], find_gpu("H100"), validation=figures[1])
    return plan, PlanEstimate(plan, basis).memory


def _figures(folder: Path, split: str) -> PackFigures:
    store = open_store(folder, split)
    return PackFigures.of_store(store.length_tokens, store.pack_figures, store.documents, store.pack_offsets)


def _packs(case: Case, folder: Path, shared: Path) -> DataFacts:
    """Two documents in each pack."""

    def documents(length: int) -> list[Any]:
        lengths = [length * 5 // 8, length - length * 5 // 8] * (STEPS * case.micro * case.passes * case.processes)
        return [([2 + at % 50 for at in range(each)], [1] * each, {}) for each in lengths]

    tokenizer = materialise("tokenizer", shared / "builtin")
    validation = case.validation or case.length
    splits = {"train": documents(case.length), "validation": documents(validation)}
    write_prepared(folder, splits, length_tokens=max(case.length, validation), tokenizer=str(tokenizer))
    manifest = read_data_manifest(folder)
    assert isinstance(manifest, DataManifest)
    facts = manifest.splits["train"].model_dump(exclude={"files"})
    return DataFacts(folder=str(folder), content_hash=manifest.content_hash, tokenizer=str(tokenizer), **facts)


# --- in a rank ------------------------------------------------------------------------------------


class Done(BaseException):
    """All that is to be measured has run; no checkpoint is written."""


def _rank(run_folder: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    plan = read_plan(Path(run_folder))
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        take = _on_cuda
        if plan.topology.device == "cpu":
            live = stack.enter_context(LivePeak([]))
            stack.enter_context(mock.patch.object(start, "start_engine", _with_weights(live)))
            take = live.take
        stack.enter_context(mock.patch.object(HeartbeatWriter, "phase", _noted(peaks, take)))
        try:
            worker.run_worker(Path(run_folder) / "plan.json", StopRequest())
        except Done:
            file = Path(run_folder) / PEAKS.format(os.environ.get("RANK", "0"))
            file.write_text(json.dumps(peaks), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the other ranks may be gone, and destroying the group would wait for them


def _noted(peaks: dict[str, int], take: Callable[[], int]) -> Any:
    before = HeartbeatWriter.phase
    ends = [""]

    def phase(self: HeartbeatWriter, name: Any, step: int | None = None) -> None:
        peaks[ends[0]] = max(peaks.get(ends[0], 0), take())
        ends[0] = name
        if name == "save":
            peaks.pop("", None)
            raise Done
        before(self, name, step)

    return phase


def _with_weights(live: LivePeak) -> Callable[..., Engine]:
    """Weights lie in the mapped file, or were put in the place of others: no operator has made them."""

    def started(*arguments: Any) -> Engine:
        engine = start_engine(*arguments)
        live.count(weight_tensors(engine.model))
        return engine

    return started


def _on_cuda() -> int:
    if not torch.cuda.is_initialized():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
