"""Runs to measure: prepared data, a model with random weights and a plan; then the worker, or steps by hand."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from packhorse.data.data_manifest import DataManifest, read_data_manifest
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.store import open_store
from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.estimate.gpus import find_gpu, gpu_of_device
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.model.load import ModelRequest
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import ATTEMPT_VARIABLE, DataFacts, RunPlan, write_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.quickstart.files import materialise
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.attempts import read_rank_records
from packhorse.run_folder.layout import METRICS_FILE, PLAN_FILE, attempt_logs
from packhorse.train import setup, worker
from packhorse.train.engine.engine import Engine, start_accelerator, start_engine
from packhorse.train.engine.optimizer import make_optimizer
from packhorse.train.engine.precision import set_matmul_precision
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.ranks.signals import StopRequest
from prepared import write_prepared
from setting import Setting

TINY = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
WORDS = 2000
"""Token ids are drawn below this."""
RUN_SECONDS = 300
# A process takes its environment as it starts, and several are started by threads.
STARTING = threading.Lock()
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        estimate: What the plan predicts on this GPU; on a CPU or an unknown GPU, on an H100.
    """

    plan: RunPlan
    estimate: PlanEstimate

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.plan.run_folder)

    def figures(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def make_run(
    setting: Setting,
    name: str,
    base: Path,
    lengths: Sequence[int],
    *,
    packs: int = 1,
    micro: int = 1,
    steps: int = 4,
    gpus: Sequence[str] | None = None,
    **sections: Any,  # noqa: ANN401
) -> Run:
    """Prepare data and plan of a run on one device.

    Args:
        setting: What is measured on.
        name: Folder of the run, which must be new.
        base: Folder of the model, or of its config.json alone.
        lengths: Tokens of the documents of each pack.
        packs: Packs of a step.
        micro: Packs of a pass.
        steps: Steps of the run.
        gpus: Names of the GPUs; None takes those of the setting, and none plans for the CPU.
        sections: Other sections of the recipe; `parallel` is completed.
    """
    folder, length = setting.folder / name, sum(lengths)
    data = _write_data(folder / "data", lengths, packs * steps, setting.folder)
    fields = {
        "name": "run",
        "runs_folder": str(folder),
        "model": {"path": str(base), "tokenizer": "builtin:tokenizer"},
        "data": {"sources": [{"path": "builtin:core.messages.jsonl"}]},
        "batch": {"length": length, "packs": packs, "micro": micro},
        "steps": steps,
        "evaluation": {"max_answered_rows": 0},
        "track": {"wandb": "off"},
        "optimizer": {"learning_rate": 1e-3},
        **sections,
    }
    fields["parallel"] = {"engine": "single", "processes": 1, **sections.get("parallel", {})}
    names = setting.gpus if gpus is None else tuple(gpus)
    plan = make_plan(Recipe.model_validate(fields), DeviceRequest(), Hardware(os.cpu_count() or 1, names), data)
    Path(plan.run_folder).mkdir(parents=True)
    write_plan(plan, Path(plan.run_folder))
    shape = read_shape(json.loads((base / "config.json").read_text(encoding="utf-8")))
    assert shape is not None
    store = open_store(folder / "data", "train")
    packed = PackFigures.of_store(store.length_tokens, store.pack_figures, store.documents)
    gpu = gpu_of_device(setting.gpu) or find_gpu("H100")
    return Run(plan, PlanEstimate(plan, EstimateInputs(shape, packed, gpu)))


def _write_data(folder: Path, lengths: Sequence[int], num_packs: int, shared: Path) -> DataFacts:
    drawn = np.random.default_rng(0)

    def documents(count: int) -> list[Any]:
        # Two of three tokens are supervised.
        every = [length for _ in range(count) for length in lengths]
        return [(drawn.integers(2, WORDS, n).tolist(), [int(at % 3 > 0) for at in range(n)], {}) for n in every]

    tokenizer = materialise("tokenizer", shared / "builtin")
    splits = {"train": documents(num_packs), "validation": documents(1)}
    write_prepared(folder, splits, vocab_size=2048, length_tokens=sum(lengths), tokenizer=str(tokenizer))
    manifest = read_data_manifest(folder)
    assert isinstance(manifest, DataManifest)
    facts = manifest.splits["train"].model_dump(exclude={"files"})
    return DataFacts(folder=str(folder), content_hash=manifest.content_hash, tokenizer=str(tokenizer), **facts)


# --- models with random weights -------------------------------------------------------------------


def write_config(folder: Path, config: Config) -> Path:
    """Write config.json alone: `on_device` then makes the weights where they are needed."""
    _config_of(config).save_pretrained(folder)
    return folder


def write_model(folder: Path, config: Config, setting: Setting, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Make a model on the device, and write it in Hugging Face form."""
    _drawn(_config_of(config), torch.device(setting.device), dtype).save_pretrained(folder)
    return folder


def model_of(config: Config, setting: Setting) -> PreTrainedModel:
    """Return a model in bfloat16 on the device, for evaluation."""
    return _drawn(_config_of(config), torch.device(setting.device), torch.bfloat16).eval()


@contextmanager
def on_device() -> Iterator[None]:
    """Let `training_model` draw weights on the device, where it would read them: an 8B takes minutes on a CPU."""

    def drawn(request: ModelRequest, vocab_size: int) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(request.source)
        config._attn_implementation = request.attention
        return _drawn(config, request.device, request.dtype)

    with mock.patch.multiple(setup, open_model=lambda *_: None, load_model=drawn):
        yield


def _config_of(config: Config) -> Any:  # noqa: ANN401
    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 32_768, **config}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _drawn(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:  # noqa: ANN401
    torch.manual_seed(0)
    with device, local_torch_dtype(dtype):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return model


# --- steps by hand, to be timed and profiled ------------------------------------------------------


@dataclass
class Stepper:
    """The engine and the loader of a run, whose steps are made by hand."""

    engine: Engine
    loader: PackLoader
    num_steps: int
    done: int = 0

    def step(self) -> float | torch.Tensor:
        """Make one optimizer step as the step loop does; return its loss, which is on the device."""
        batch = self.loader.step(self.done % self.num_steps)
        factor = self.engine.gradient_factor / batch.num_supervised_tokens
        total: float | torch.Tensor = 0.0
        for index, micro_batch in enumerate(batch.micro_batches, start=1):
            with self.engine.micro_step(is_last=index == len(batch.micro_batches)):
                loss = micro_batch_loss(self.engine.model, micro_batch, self.engine.device)
                self.engine.backward(loss * factor)
            total = total + loss.detach() / batch.num_supervised_tokens
        self.engine.step()
        self.done += 1
        return total


@contextmanager
def stepper(run: Run) -> Iterator[Stepper]:
    """Start the engine of a run in this process, as the worker does."""
    plan = run.plan
    os.environ.update(plan.env)
    set_matmul_precision(plan.recipe.tf32)
    accelerator = start_accelerator(plan)
    worker.quiet_libraries(is_main=False)
    assert plan.data is not None
    assert plan.num_steps is not None
    tokenizer = tokenizer_of(plan.recipe, Path(plan.data.tokenizer))
    model = setup.training_model(plan, tokenizer, accelerator.device, None, lambda: None)
    engine = start_engine(accelerator, plan, model, make_optimizer(model, plan.recipe))
    loader = setup.step_loader(plan, 0, pinned=plan.topology.device == "cuda")
    try:
        yield Stepper(engine, loader, plan.num_steps)
    finally:
        loader.close()


def peak_gib(setting: Setting) -> float | None:
    """Return the peak of torch's allocator since it was last reset."""
    return torch.cuda.max_memory_allocated() / 2**30 if setting.is_cuda else None


# --- the real worker, in a process ----------------------------------------------------------------


def train(plan: RunPlan, attempt: int = 1, before: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the worker of a plan in a process, and return its record: exit code, message, and what would follow.

    Args:
        plan: Plan of a run on one device; its plan.json is what counts.
        attempt: Number of the attempt.
        before: Called in that process first; pickled.

    Raises:
        ModuleNotFoundError: The worker lacks a library.
    """
    on_cpu = plan.topology.device == "cpu"
    # A server that has imported all is quicker, and may have touched CUDA, which no fork survives.
    context: Any = mp.get_context("forkserver" if on_cpu else "spawn")
    if on_cpu:
        context.set_forkserver_preload(["packhorse.train.worker"])
    variables = {**plan.env, ATTEMPT_VARIABLE: str(attempt), "OMP_NUM_THREADS": "1"}
    with STARTING, mock.patch.dict(os.environ, variables):
        process = context.Process(target=_work, args=(plan.run_folder, variables, before))
        process.start()
    process.join(RUN_SECONDS)
    process.kill()
    process.join()
    records = read_rank_records(attempt_logs(Path(plan.run_folder), attempt))
    if not records:
        return {"exit_code": process.exitcode, "message": "the process wrote no record", "again": None}
    if missing := re.search(r"ModuleNotFoundError: No module named '(\w+)", records[0]["message"]):
        raise ModuleNotFoundError(name=missing[1])
    return records[0]


def _work(run_folder: str, variables: Mapping[str, str], before: Callable[[], None] | None) -> None:
    os.environ.update(variables)
    if before is not None:
        before()
    code = worker.run_worker(Path(run_folder) / PLAN_FILE, StopRequest())
    sys.stdout.flush()
    os._exit(code)
