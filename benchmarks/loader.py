"""Time from a start at step k to that step's batch, and tokens a second that one loader thread lays out.

    python benchmarks/loader.py [--rows 1000000] [--folder FOLDER] [--write]

A store of a million rows is written first (1.5 GB in FOLDER, removed afterwards). Each start is a new mapping of the
store, a new batch plan and a new loader, as after a crash; `cold` drops the store's pages from the page cache before,
so that they come from the disk. Exit code 1 where a start with the pages in memory takes more than 50 ms.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

import lab_log
from packhorse.data.data_manifest import DataManifest, SplitCounts, write_data_manifest
from packhorse.data.ledger import Entry, Ledger
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.packing import pack
from packhorse.data.packs.store import open_store, write_split
from packing import log_normal

LENGTH, PACKS_PER_STEP, RANKS = 4096, 64, 8
VOCAB_SIZE = 32_768
BAR_MS = 50.0
ROUNDS = 5
STEPS_READ = 40
PIECE_TOKENS = 1 << 22


@dataclass(frozen=True)
class Start:
    """Milliseconds of one start."""

    open_ms: float
    batch_ms: float


def main() -> int:
    """Measures, prints the table, and writes it down where asked to."""
    options = _options()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-", dir=options.folder) as name:
        folder = Path(name) / "data"
        counts = write_store(folder, options.rows)
        steps = named_steps(counts.num_packs)
        starts = {
            (title, cold): _median_start(folder, step, cold) for title, step in steps.items() for cold in (False, True)
        }
        speeds = {processes: _tokens_per_second(folder, processes) for processes in (1, RANKS)}
    text = _describe(counts, steps, starts, speeds)
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Loader: a start at any step", text)
    if options.smoke:
        return 0
    return 0 if all(start.batch_ms <= BAR_MS for (_, cold), start in starts.items() if not cold) else 1


def write_store(folder: Path, num_rows: int) -> SplitCounts:
    """Writes a train split of random tokens, a third of them supervised, with the lengths of benchmarks/packing.py."""
    lengths = log_normal(num_rows, LENGTH)
    mask = np.arange(PIECE_TOKENS) % 3 == 0
    labels = -(-(lengths - 1) // 3)  # as good as any: the loader's time does not depend on it
    counts = write_split(
        folder / "train",
        ids=_pieces(np.random.default_rng(0).integers(0, VOCAB_SIZE, PIECE_TOKENS, np.uint16), int(lengths.sum())),
        supervised=_pieces(mask, int(lengths.sum())),
        lengths=lengths,
        labels=labels,
        rows=None,
        vocab_size=VOCAB_SIZE,
        length_tokens=LENGTH,
        packing=pack(lengths, LENGTH, "mixed", 0),
    )
    every = Entry(rows=num_rows, tokens=counts.num_tokens)
    manifest = DataManifest(
        version="0",
        content_hash="0" * 16,
        tokenizer="",
        vocab_size=VOCAB_SIZE,
        template="tokenizer",
        stop_token="",
        length_tokens=LENGTH,
        settings={},
        shares=(1.0, 0.0, 0.0),
        shares_reason="all rows are trained on",
        sources=(),
        splits={"train": counts},
        fields=(),
        ledger=Ledger(rows_in=every, losses={}, kept={"train": every}),
    )
    write_data_manifest(manifest, folder)
    return counts


def _pieces(piece: NDArray[np.generic], num_tokens: int) -> Iterator[NDArray[np.generic]]:
    for start in range(0, num_tokens, len(piece)):
        yield piece[: num_tokens - start]


def named_steps(num_packs: int) -> dict[str, int]:
    """First, middle and last step of an epoch, and the middle of the third."""
    per_epoch = -(-num_packs // PACKS_PER_STEP)
    return {
        "0": 0,
        "middle": per_epoch // 2,
        "last of the epoch": per_epoch - 1,
        "middle of epoch 3": 2 * per_epoch + per_epoch // 2,
    }


def _median_start(folder: Path, step: int, cold: bool) -> Start:
    starts = [_start(folder, step, cold) for _ in range(ROUNDS)]
    return Start(median(start.open_ms for start in starts), median(start.batch_ms for start in starts))


def _start(folder: Path, step: int, cold: bool) -> Start:
    if cold:
        _forget(folder)
    began = time.perf_counter()
    store = open_store(folder, "train")
    opened = time.perf_counter()
    loader = PackLoader(store, BatchPlan(store.pack_costs, PACKS_PER_STEP, 0), 0, RANKS, 1, device_pin=False)
    loader.step(step)
    done = time.perf_counter()
    loader.close()
    return Start((opened - began) * 1000, (done - opened) * 1000)


def _forget(folder: Path) -> None:
    """Drops the pages of these files, which nothing maps now, from the page cache (posix_fadvise(2))."""
    for file in folder.rglob("*.[bn][ip][ny]"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _tokens_per_second(folder: Path, world_size: int) -> float:
    """Of one rank's loader, a CPU second; its pages are in memory after a first pass."""
    store = open_store(folder, "train")
    plan = BatchPlan(store.pack_costs, PACKS_PER_STEP, 0)
    speeds = []
    for _ in range(2):
        loader = PackLoader(store, plan, 0, world_size, 1, device_pin=False)
        began = time.process_time()
        num_tokens = sum(each.num_tokens for step in range(STEPS_READ) for each in loader.step(step).micro_batches)
        loader.close()
        speeds.append(num_tokens / (time.process_time() - began))
    return speeds[-1]


def _describe(
    counts: SplitCounts, steps: dict[str, int], starts: dict[tuple[str, bool], Start], speeds: dict[int, float]
) -> str:
    header = ("start at step", "k", "store opened", "batch, pages in memory", "bar", "met", "batch, pages on disk")
    rows = [_row(title, step, starts[title, False], starts[title, True]) for title, step in steps.items()]
    notes = [
        f"{counts.num_rows:,} rows, {counts.num_tokens:,} tokens in {counts.num_packs:,} packs of {LENGTH:,};"
        f" {PACKS_PER_STEP} packs a step, {RANKS} ranks; median of {ROUNDS} starts.",
        lab_log.machine(1, ("torch", "numpy")) + ".",
        f"One loader thread lays out {speeds[1] / 1e6:,.0f} million tokens a CPU second where its rank takes the whole"
        f" step, {speeds[RANKS] / 1e6:,.0f} million where it takes one {RANKS}th.",
    ]
    return "\n".join([*notes, "", lab_log.markdown_table(header, rows)])


def _row(title: str, step: int, warm: Start, cold: Start) -> Sequence[str]:
    return [
        title,
        f"{step:,}",
        f"{warm.open_ms:.1f} ms",
        f"{warm.batch_ms:.1f} ms",
        f"{BAR_MS:.0f} ms",
        "yes" if warm.batch_ms <= BAR_MS else "NO",
        f"{cold.batch_ms:.1f} ms",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="documents of the store")
    parser.add_argument("--folder", help="where the store is written; absent, the system's temporary folder")
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    options = parser.parse_args()
    if options.smoke:
        options.rows = 20_000
    return options


if __name__ == "__main__":
    sys.exit(main())
