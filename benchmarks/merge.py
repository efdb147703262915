"""Merging an adapter of all linear layers: seconds beside copying the files of the base, and host memory.

    python benchmarks/merge.py [--gigabytes 8] [--folder FOLDER] [--write]

Base and adapter are random, in bf16, with the shapes of an 8B Llama and as many layers as make the size. Memory is that
of the process above its start, without pages of files (RssAnon): those of the base are the page cache's. Exit code 1
where a merge is slower than copying divided by .7, or takes more than 2 GB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

import lab_log
from packhorse.export.merge.adapter import PREFIX, StoredAdapter
from packhorse.export.merge.base import open_base
from packhorse.export.merge.merge import write_merged
from packhorse.model.load import ModelRequest

LEAST_SHARE, MOST_GB = 0.7, 2.0
RANK = 16
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYER_GB = sum(2 * rows * columns for rows, columns in SHAPES.values()) / 1e9


def main() -> int:
    """Measure, print the table, and write it down if asked to."""
    options = _options()
    scale = 32 if options.smoke else 1
    layers = 2 if options.smoke else max(1, round(options.gigabytes / LAYER_GB))
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-", dir=options.folder) as name:
        base, adapter, out = (Path(name) / part for part in ("base", "adapter", "out"))
        size = write_base(base, layers, scale) / 1e9
        write_adapter(adapter, layers, scale)
        copied = _seconds(lambda: _copy(base, Path(name) / "copy"))
        shutil.rmtree(Path(name) / "copy")
        out.mkdir()
        with memory_peak() as peak:
            merged = _seconds(lambda: merge(base, adapter, out))
    rows = [
        ["copy of the files", f"{copied:.1f}", f"{size / copied:.2f}", "-"],
        ["merge", f"{merged:.1f}", f"{size / merged:.2f}", f"{peak[0]:.2f}"],
    ]
    text = (
        f"{size:.1f} GB in bf16, {layers} layers of an 8B Llama, LoRA of rank {RANK} on all linear layers. "
        f"{lab_log.machine(2, ['torch', 'peft'])}\n\n"
        + lab_log.markdown_table(["", "seconds", "GB/s", "memory, GB"], rows)
        + f"\n\nMerge beside copy: {copied / merged:.2f} of its speed (bar {LEAST_SHARE})."
    )
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Merging an adapter", text)
    return int(not options.smoke and (copied / merged < LEAST_SHARE or peak[0] > MOST_GB))


def write_base(folder: Path, layers: int, scale: int) -> int:
    """Write a base of random weights, one file per layer; return its bytes."""
    folder.mkdir()
    config = LlamaConfig(
        hidden_size=4096 // scale,
        intermediate_size=14336 // scale,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    index = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        weights = {
            f"model.layers.{layer}.{name}.weight": torch.randn(rows // scale, columns // scale).bfloat16()
            for name, (rows, columns) in SHAPES.items()
        }
        if layer == 0:
            weights["model.embed_tokens.weight"] = torch.randn(1024, 4096 // scale).bfloat16()
        save_file(weights, folder / file)
        index |= dict.fromkeys(weights, file)
    (folder / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_adapter(folder: Path, layers: int, scale: int) -> None:
    """Write an adapter of random weights."""
    LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=sorted(SHAPES)).save_pretrained(
        folder
    )
    weights = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            key = f"{PREFIX}model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = 0.01 * torch.randn(RANK, columns // scale)
            weights[f"{key}.lora_B.weight"] = 0.01 * torch.randn(rows // scale, RANK)
    save_file(weights, folder / "adapter_model.safetensors")


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Merge as `packhorse export` does, without the proof."""
    request = ModelRequest(str(base), None, None, 0, torch.bfloat16, "eager", None, False, torch.device("cpu"))
    seen = open_base(request, 1024, unrounded=False, scratch=out)
    write_merged(seen, StoredAdapter(adapter).changes(), torch.bfloat16, out, lambda done, total: None, "")


def _copy(source: Path, target: Path) -> None:
    """Copy through memory, with the hash that a merge also takes, and wait for the disk."""
    import hashlib

    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as opened, (target / file.name).open("wb") as written:
            while piece := opened.read(1 << 24):
                digest.update(piece)
                written.write(piece)
            written.flush()
            os.fsync(written.fileno())


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


@contextmanager
def memory_peak() -> Iterator[list[float]]:
    """Yield a list whose first number becomes the peak of private memory above the start, GB."""
    peak, stop = [0.0], threading.Event()
    start = _private_gb()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], _private_gb() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _private_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e6


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the base")
    parser.add_argument(
        "--folder", help="where the files are written and removed; default: the system's temporary folder"
    )
    parser.add_argument("--write", action="store_true", help="write the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
