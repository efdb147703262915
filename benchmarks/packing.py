"""Packing: CPU seconds, fill and memory beside TRL's packer; how mixed the packs are; how evenly steps are shared.

    python benchmarks/packing.py [--trl-rows 100000] [--write]

Lengths are log-normal (median 350, σ 0.9), clipped to [8, 4096] and to T. TRL's packer works through map batches of
1,000 rows, so its time is measured on fewer rows and multiplied. Each packing runs in a process of its own, and its
peak memory is what that process held beyond the lengths. Exit code 1 where a bar is missed.

Two figures say whether a pack is a sample of the rows: the variance of the packs' mean log-length ÷ what drawing as
many rows at random would give (1: as at random; less: more even), and how often two rows of a pack are of one 50th of
the lengths ÷ how often any two rows are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

import lab_log
from packhorse.data.packs.batches import NULL_PACK, BatchPlan
from packhorse.data.packs.packing import Packing, pack

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

ROUNDS = 5
MILLION = 1_000_000
FEW = 50_000
TRL_BATCH = 1_000
LEAST_TIMES_TRL = 100.0
LENGTH_CLASSES = 50
# Llama-3 8B: FLOPs of a token are 6 (N - E) + 6 L h S, so a document of length S costs S + S² · RATIO, in linear FLOPs.
PARAMETERS, EMBEDDING, LAYERS, WIDTH = 8_030_261_248, 128_256 * 4096, 32, 4096
RATIO = LAYERS * WIDTH / (PARAMETERS - EMBEDDING)
NUM_RANKS = 64
# Long-context lengths: with σ 1.8 packs in random order are as uneven as STACK.md's (1.35 at 32k, 2.02 at 131k).
LONG_MEDIAN, LONG_SIGMA = 350, 1.8


@dataclass(frozen=True)
class Case:
    """Something packed, and what is demanded of it."""

    how: str
    num_rows: int
    capacity: int
    most_seconds: float
    least_fill: float
    most_bytes: float | None = None


CASES = (
    *(Case("best_fit", MILLION, capacity, 0.15, 0.9998) for capacity in (2048, 4096, 8192)),
    Case("best_fit", MILLION, 131_072, 0.15, 0.999),
    Case("best_fit", 10 * MILLION, 4096, 2.0, 0.9998, 512 * 2**20),
    *(Case("mixed", MILLION, capacity, 0.3, 0.9995) for capacity in (2048, 4096, 8192)),
    Case("mixed", MILLION, 131_072, 0.3, 0.999),
    Case("mixed", 10 * MILLION, 4096, 5.0, 0.9995),
)


SMOKE = (Case("best_fit", FEW, 2048, 0.15, 0.99), Case("mixed", FEW, 4096, 0.3, 0.99))


@dataclass(frozen=True)
class Packed:
    """What a packing cost, and what came out."""

    seconds: float
    fill: float
    peak_bytes: int
    mean_variance: float
    like_pairs: float


@dataclass(frozen=True)
class Imbalance:
    """Cost of the dearest rank ÷ mean over ranks, mean over steps: by FLOPs of an 8B model, and by Σ length² alone."""

    capacity: int
    how: str
    packs_per_step: int
    most: float
    random: float
    flops: float
    squares: float


def main() -> int:
    """Measures, prints the tables, and writes them down where asked to."""
    options = _options()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    cases, capacities, num_rows = (SMOKE, (), FEW) if options.smoke else (CASES, (2048, 4096, 8192), MILLION)
    packed = {case: _alone(measure_packing, case) for case in cases}
    theirs = {capacity: _alone(measure_trl, options.trl_rows, capacity) for capacity in capacities}
    sizes = ((32_768, 1.01), (131_072, 1.03))
    shared = [found for capacity, most in sizes for found in measure_shares(capacity, most, num_rows)]
    text = "\n\n".join([_packing_table(packed, theirs, options.trl_rows), _shares_table(shared)])
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Packing", text)
    if options.smoke:
        return 0
    fast = all(times_trl(packed, theirs, capacity, options.trl_rows) >= LEAST_TIMES_TRL for capacity in theirs)
    return 0 if fast and all(met(case, of) for case, of in packed.items()) and all(map(even, shared)) else 1


def log_normal(num_rows: int, capacity: int) -> Int64:
    """Lengths of rows, int64 [num_rows]."""
    drawn = np.random.default_rng(0).lognormal(np.log(350), 0.9, num_rows)
    return np.clip(drawn, 8, min(capacity, 4096), out=drawn).astype(np.int64)


def measure_packing(case: Case) -> Packed:
    """Packs several times; the median time counts."""
    lengths = log_normal(case.num_rows, case.capacity)
    pack(lengths[:1000], case.capacity, case.how, 0)
    before, seconds = _peak_bytes(), []
    for _ in range(ROUNDS if case.num_rows == MILLION else 1):
        began = time.process_time()
        packing = pack(lengths, case.capacity, case.how, 0)
        seconds.append(time.process_time() - began)
    # The lengths were drawn as floats first, so up to their size may be used again without a new peak.
    peak_bytes = _peak_bytes() - before + lengths.nbytes
    fill = float(lengths.sum() / (packing.num_packs * case.capacity))
    return Packed(median(seconds), fill, peak_bytes, *mixing(lengths, packing))


def measure_trl(num_rows: int, capacity: int) -> Packed:
    """TRL's packer as SFTTrainer calls it."""
    # Only in a process of its own: importing it takes half a gigabyte.
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    lengths = log_normal(num_rows, capacity)
    tokens = np.ones(int(lengths.max()), np.int32)
    documents = [tokens[:length] for length in lengths.tolist()]
    rows = Dataset.from_dict({"input_ids": documents, "labels": documents})
    before = _peak_bytes()
    began = time.process_time()
    packs = pack_dataset(rows, capacity, "bfd", {"batch_size": TRL_BATCH})
    seconds = time.process_time() - began
    return Packed(seconds, float(lengths.sum() / (len(packs) * capacity)), _peak_bytes() - before, np.nan, np.nan)


def mixing(lengths: Int64, packing: Packing) -> tuple[float, float]:
    """Variance of pack means, and pairs of one class of length, both ÷ what they are at random."""
    logs = np.log(lengths[packing.order])
    sizes = np.diff(packing.offsets)
    sums = np.add.reduceat((logs - logs.mean()) / logs.std(), packing.offsets[:-1])
    ranks = np.argsort(np.argsort(lengths, kind="stable"), kind="stable") * LENGTH_CLASSES // len(lengths)
    packs = np.repeat(np.arange(packing.num_packs), sizes)
    alike = np.bincount(packs * LENGTH_CLASSES + ranks[packing.order])
    pairs = (alike * (alike - 1)).sum() / (sizes * (sizes - 1)).sum()
    return float((sums**2 / sizes).mean()), float(pairs * LENGTH_CLASSES)


def measure_shares(capacity: int, most: float, num_rows: int) -> list[Imbalance]:
    """Shares the steps of an epoch between 64 ranks."""
    drawn = np.random.default_rng(0).lognormal(np.log(LONG_MEDIAN), LONG_SIGMA, num_rows)
    lengths = np.clip(drawn, 8, capacity).astype(np.int64)
    found = []
    for how in ("best_fit", "mixed"):
        packing = pack(lengths, capacity, how, 0)
        starts = packing.offsets[:-1]
        squares = np.add.reduceat(lengths[packing.order] ** 2, starts)
        flops = np.add.reduceat(lengths[packing.order], starts) + RATIO * squares
        for size in (64, 256):
            plan = BatchPlan(squares, size, 0)
            shares = [
                plan.share(step, NUM_RANKS, size // NUM_RANKS).reshape(NUM_RANKS, -1)
                for step in range(plan.num_steps_per_epoch)
                if NULL_PACK not in plan.packs(step)
            ]
            any_order = np.random.default_rng(0).permutation(packing.num_packs)[: len(shares) * size]
            at_random = list(any_order.reshape(len(shares), NUM_RANKS, -1))
            uneven = [_imbalance(flops, at_random), _imbalance(flops, shares), _imbalance(squares, shares)]
            found.append(Imbalance(capacity, how, size, most, *uneven))
    return found


def _imbalance(costs: Float64 | Int64, shares: Sequence[Int64]) -> float:
    of_ranks = [costs[share].sum(axis=1) for share in shares]
    return float(np.mean([of_rank.max() / of_rank.mean() for of_rank in of_ranks]))


def met(case: Case, packed: Packed) -> bool:
    """Whether a packing is as fast, full and small as demanded."""
    small = case.most_bytes is None or packed.peak_bytes <= case.most_bytes
    return packed.seconds <= case.most_seconds and packed.fill >= case.least_fill and small


def even(found: Imbalance) -> bool:
    """Whether the ranks' shares of a step are as even as demanded."""
    return found.flops <= found.most


def _packing_table(packed: dict[Case, Packed], theirs: dict[int, Packed], trl_rows: int) -> str:
    header = ("packing", "rows", "T", "CPU s", "bar", "fill", "bar", "extra peak", "met", "variance", "like pairs")
    rows = [_packing_row(case, of) for case, of in packed.items()]
    for capacity, of in theirs.items():
        seconds = of.seconds * MILLION / trl_rows
        rows.append(
            ["TRL bfd", f"{MILLION:,}", f"{capacity:,}", f"{seconds:.1f}", "", f"{of.fill:.3%}", "", "", "", "", ""]
        )
    times = [f"{times_trl(packed, theirs, capacity, trl_rows):,.0f} × at T {capacity:,}" for capacity in theirs]
    notes = [
        f"Log-normal lengths, median 350, σ .9, clipped to 8 and 4,096 (and T); median of {ROUNDS} rounds, one for 1e7"
        " rows; index only.",
        lab_log.machine(1, ("numpy", "trl", "datasets")) + ".",
        f"`best_fit` is faster than TRL's packer by {', '.join(times)} (bar {LEAST_TIMES_TRL:.0f}). TRL packed"
        f" {trl_rows:,} rows in map batches of {TRL_BATCH:,}, scaled; it rewrites tokens and labels as well.",
        "Variance: of the packs' mean log-length; like pairs: of one 50th of the lengths; both ÷ what random rows"
        " give.",
    ]
    return "\n".join([*notes, "", lab_log.markdown_table(header, rows)])


def _packing_row(case: Case, packed: Packed) -> list[str]:
    return [
        case.how,
        f"{case.num_rows:,}",
        f"{case.capacity:,}",
        f"{packed.seconds:.3f}",
        f"{case.most_seconds:.2f}",
        f"{packed.fill:.3%}",
        f"{case.least_fill:.2%}",
        f"{packed.peak_bytes / 2**20:,.0f} MiB",
        "yes" if met(case, packed) else "NO",
        f"{packed.mean_variance:.2f}",
        f"{packed.like_pairs:.1f}",
    ]


def _shares_table(shared: Sequence[Imbalance]) -> str:
    header = ("T", "packs", "packs a step", "random order", "8B FLOPs", "bar", "met", "Σ length² alone")
    rows = [
        [
            f"{found.capacity:,}",
            found.how,
            f"{found.packs_per_step}",
            f"{found.random:.3f}",
            f"{found.flops:.4f}",
            f"{found.most:.2f}",
            "yes" if even(found) else "NO",
            f"{found.squares:.4f}",
        ]
        for found in shared
    ]
    note = (
        f"Cost of the dearest of {NUM_RANKS} ranks ÷ mean over ranks, mean over an epoch's steps; log-normal lengths,"
        f" median {LONG_MEDIAN}, σ {LONG_SIGMA}, clipped to T. 8B FLOPs: of Llama-3 8B, attention and all else."
    )
    return "\n".join([note, "", lab_log.markdown_table(header, rows)])


def times_trl(packed: dict[Case, Packed], theirs: dict[int, Packed], capacity: int, trl_rows: int) -> float:
    """How many times faster best fit packs a million rows than TRL's packer, whose time is scaled up to as many."""
    wanted = ("best_fit", MILLION, capacity)
    ours = next(of for case, of in packed.items() if (case.how, case.num_rows, case.capacity) == wanted)
    return theirs[capacity].seconds * MILLION / trl_rows / ours.seconds


def _alone(measure: Callable[..., Packed], *arguments: Case | int) -> Packed:
    """Runs in a fresh process, so that peaks of memory do not add up."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-rows", type=int, default=100_000, help="rows that TRL's packer is given")
    parser.add_argument("--write", action="store_true", help="append the tables to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
