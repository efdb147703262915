"""What each of eight ranks reads, writes and holds for a checkpoint of sharded weights, and the same for a 70B.

    python benchmarks/checkpoint_scale.py [--ranks 8] [--write]

A Llama of 270 million parameters in fp32 with AdamW's moments (3.2 GB), of as many layers as a 70B, is sharded by FSDP2
over gloo ranks on one machine, saved, and loaded again, by the very code that a run does it with; files are as much
smaller than a run's as the model is. Written: what the kernel counts for a rank (`write_bytes`). Read: the bytes that a
rank takes from safetensors; on a CPU they are mapped, and the page cache keeps them once per node. Held: the most
anonymous memory, without that of the ranks before.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import lab_log

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 68,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
LARGE = 70.6e9
"""Parameters of Llama 3 70B."""
PACKAGES = ("torch", "transformers", "safetensors")
CPU = torch.device("cpu")
read_bytes: list[int] = []


class CountedSlice:
    """A slice of a file that counts what is taken of it."""

    def __init__(self, stored: Any) -> None:  # noqa: ANN401
        self._stored = stored

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stored, name)

    def __getitem__(self, rows: slice) -> Tensor:
        return counted(self._stored[rows])


class CountedFile:
    """`safetensors.safe_open`, which counts what is taken of a file."""

    def __init__(self, *words: str, **settings: str) -> None:
        self._file = safe_open(*words, **settings)

    def __enter__(self) -> CountedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        return counted(self._file.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self._file.get_slice(name))


def counted(tensor: Tensor) -> Tensor:
    read_bytes.append(tensor.nbytes)
    return tensor


# Before Packhorse takes it by name.
safe_open, safetensors.safe_open = safetensors.safe_open, CountedFile

from packhorse.model.load import ModelRequest, open_model  # noqa: E402
from packhorse.plan.make_plan import make_plan  # noqa: E402
from packhorse.plan.run_plan import RunPlan, write_plan  # noqa: E402
from packhorse.plan.topology import DeviceRequest, detect_hardware  # noqa: E402
from packhorse.recipe.load import load_recipe  # noqa: E402
from packhorse.recipe.methods import FullMethod  # noqa: E402
from packhorse.train.checkpoint import saved_tensor  # noqa: E402
from packhorse.train.checkpoint.checkpoints import Checkpoints  # noqa: E402
from packhorse.train.engine.engine import Engine  # noqa: E402
from packhorse.train.engine.optimizer import make_optimizer  # noqa: E402
from packhorse.train.engine.sharding import Placement, placement_of  # noqa: E402
from packhorse.train.loading import place_streamed  # noqa: E402
from packhorse.train.state import TrainState  # noqa: E402
from saving import DATA  # noqa: E402
from step_loop import HERE  # noqa: E402


def main() -> int:
    """Measures, prints the tables, and writes them down where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="append the tables to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    sizes, ranks = (MODEL | SMALL, 2) if options.smoke else (MODEL, options.ranks)
    rows, large = [], []
    for title, asynchronous in (("asynchronous", True), ("synchronous", False)):
        records = _measured(ranks, asynchronous, sizes)
        rows.append(_row(f"save, {title}", records, "saved"))
        large.append(_large(f"save, {title}", records, "saved"))
    rows.append(_row("resume", records, "loaded"))
    large.append(_large("resume", records, "loaded"))
    num_parameters = records[0]["num_parameters"]
    header = ("fsdp2", "written", "read", "most held", "all ranks written", "read", "held", "seconds")
    text = (
        f"Fresh Llama of {num_parameters / 1e6:,.0f} million parameters, fp32 with AdamW's moments, {ranks} gloo ranks;"
        f" bytes of the largest rank and of all.\n{lab_log.machine(1, PACKAGES)}.\n\n"
        + lab_log.markdown_table(header, rows)
        + f"\n\nTimes {LARGE / num_parameters:,.0f}, for 70.6 billion parameters on one node of {ranks}:\n\n"
        + lab_log.markdown_table(header[:-1], large)
    )
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Checkpoints of sharded weights", text)
    return 0


FIGURES = ("written", "read", "held")


def _row(title: str, records: list[dict[str, Any]], phase: str) -> list[str]:
    most = [max(record[phase][name] for record in records) for name in FIGURES]
    total = [sum(record[phase][name] for record in records) for name in FIGURES]
    seconds = max(record[phase]["seconds"] for record in records)
    return [title, *(f"{value / 1e6:,.0f} MB" for value in (*most, *total)), f"{seconds:.1f}"]


def _large(title: str, records: list[dict[str, Any]], phase: str) -> list[str]:
    factor = LARGE / records[0]["num_parameters"]
    most = [max(record[phase][name] for record in records) for name in FIGURES]
    total = [sum(record[phase][name] for record in records) for name in FIGURES]
    return [title, *(f"{factor * value / 1e9:,.0f} GB" for value in (*most, *total))]


def _measured(ranks: int, asynchronous: bool, sizes: dict[str, int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as name:
        words = [f"runs_folder={name}", "parallel.engine=fsdp2", f"parallel.processes={ranks}"]
        words += [f"checkpoint.asynchronous={str(asynchronous).lower()}", f"batch.packs={ranks}"]
        plan = make_plan(load_recipe(str(HERE / "step_loop.yaml"), words), DeviceRequest(None), detect_hardware(), DATA)
        Path(plan.run_folder).mkdir()
        write_plan(plan, Path(plan.run_folder))
        for work in (_save, _load):
            # From one process that has imported all; new ones for each phase, whose memory is fresh.
            process = partial(_process, plan=plan, folder=name, sizes=sizes, work=work)
            mp.start_processes(process, nprocs=ranks, start_method="fork")
        return [json.loads((Path(name) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _process(rank: int, plan: RunPlan, folder: str, sizes: dict[str, int], work: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    size = plan.topology.world_size
    dist.init_process_group("gloo", f"file://{folder}/{work.__name__}", timedelta(minutes=10), size, rank)
    work(rank, plan, Path(folder) / f"{rank}.json", sizes)
    dist.barrier()
    dist.destroy_process_group()


def _save(rank: int, plan: RunPlan, record: Path, sizes: dict[str, int]) -> None:
    placement = placement_of(plan, CPU)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    saved_tensor.MAX_FILE_BYTES = int(saved_tensor.MAX_FILE_BYTES * num_parameters / LARGE)  # type: ignore[misc]
    for layer in model.model.layers:
        placement.unit([layer], is_last=False)
    placement.root(model)
    model.to_empty(device=CPU)
    torch.manual_seed(rank)
    for parameter in model.parameters():
        parameter.data.to_local().normal_()  # type: ignore[attr-defined]
    engine = _engine(model, plan)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    checkpoints = Checkpoints(plan, engine, is_main=rank == 0)
    dist.barrier()
    with _watched() as figures:
        checkpoints.save(TrainState(step=1))
        checkpoints.finish()
    record.write_text(json.dumps({"saved": figures, "num_parameters": num_parameters}), encoding="utf-8")


def _load(rank: int, plan: RunPlan, record: Path, sizes: dict[str, int]) -> None:
    checkpoint = Path(plan.run_folder) / "checkpoints" / "step-000001"
    request = ModelRequest(
        source=str(checkpoint / "model"),
        revision=None,
        config=None,
        seed=0,
        dtype=torch.float32,
        attention="sdpa",
        quantization=None,
        trust_remote_code=False,
        device=CPU,
    )
    placement: Placement = placement_of(plan, CPU)
    dist.barrier()
    with _watched() as figures:
        weights = open_model(request, sizes["vocab_size"])
        assert weights is not None
        model = place_streamed(weights, lambda base: base, placement, FullMethod(), 0, CPU, lambda: None)
        Checkpoints(plan, _engine(model, plan), is_main=rank == 0).load_optimizer(checkpoint)
    saved = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(saved | {"loaded": figures}), encoding="utf-8")


def _engine(model: nn.Module, plan: RunPlan) -> Engine:
    accelerator: Any = SimpleNamespace(scaler=None, unwrap_model=lambda model: model, device=CPU)
    optimizer = make_optimizer(model, plan.recipe)
    return Engine(accelerator, model, optimizer, 1.0, clip_norm=None, control=dist.new_group(backend="gloo"))


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Give what this process writes, reads and holds meanwhile, once it is over."""
    figures: dict[str, float] = {}
    written, read, before, began = _proc("io", "write_bytes"), sum(read_bytes), _held(), time.perf_counter()
    most, over = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, _held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield figures
    finally:
        over.set()
        thread.join()
    figures["written"] = _proc("io", "write_bytes") - written
    figures["read"] = sum(read_bytes) - read
    figures["held"] = most - before
    figures["seconds"] = time.perf_counter() - began


def _held() -> int:
    return 1024 * _proc("status", "RssAnon")


def _proc(file: str, name: str) -> int:
    for line in Path("/proc/self", file).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


if __name__ == "__main__":
    sys.exit(main())
