"""Accuracy of `packhorse plan`, as tables for docs/lab-log.md, from the cases of the tests.

    python benchmarks/plan_accuracy.py [--no-write] [published] [memory] [ranks]

published: predicted and published tokens per second and GiB (seconds).
memory: planned and measured bytes of one process on a CPU (one minute).
ranks: planned and measured bytes of the first of two ranks, under every engine (two minutes).
Without arguments: all three. The exit code is 1 where a table exceeds what the tests allow. Part `memory` of
benchmarks/gpu compares the plan with a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import lab_log

TESTS = Path(__file__).parent.parent / "tests"
sys.path += [str(TESTS / part) for part in (".", "unit/estimate")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
PARTS = ("weights", "gradients", "optimizer", "activations")
Table = tuple[str, bool]
"""Text, and whether the tests allow its values."""


def main() -> int:
    """Make the requested tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-write", action="store_true", help="print the tables, do not change docs/lab-log.md")
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="tables to make; default: all")
    parser.add_argument("--smoke", action="store_true", help="make only the first table, and do not write it")
    options = parser.parse_args()
    if options.smoke:
        options.tables, options.no_write = ["published"], True
    warnings.filterwarnings("ignore")
    good = True
    for name in options.tables or TABLES:
        title, make = TABLES[name]
        text, within = make()
        print(f"{title}\n\n{text}\n")
        good &= within
        if not options.no_write:
            lab_log.append(title, text)
    return 0 if good else 1


def published() -> Table:
    """Compare predicted and published speed and memory."""
    import test_published_memory as memory_cases
    import test_published_speed as cases

    rows = []
    for row in cases.ROWS:
        speed = row.estimate().tokens_per_second_per_gpu
        figures = (f"{row.tokens_per_second:,.0f}", f"{speed:,.0f}", f"{cases.gap(row):+.0%}")
        rows.append((row.name, f"{row.count} × {row.gpu}", *figures, row.reason or "—"))
    within = [abs(cases.gap(row)) <= 0.10 for row in cases.ROWS]
    table = lab_log.markdown_table(("run", "GPUs", "published", "predicted", "gap", "reason of a gap over 10 %"), rows)
    sizes = [(row.name, f"{row.gib:.1f}", f"{row.predicted:.1f}", f"{row.gap:+.0%}") for row in memory_cases.ROWS]
    second = lab_log.markdown_table(("run on one 4090", "published GiB", "predicted GiB", "gap"), sizes)
    return f"Tokens per second and GPU. {sum(within)} of {len(within)} within 10 %.\n\n{table}\n\n{second}", True


def memory() -> Table:
    """Compare planned and measured bytes of one process, by component."""
    import test_measured_memory as cases

    import measured_memory as measuring

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        measuring.save_model(model, cases.LLAMA)
        return _components(_alone(model, cases, measuring), f"the largest of {len(cases.LENGTHS)} lengths")


def ranks() -> Table:
    """Compare planned and measured bytes of the first of two gloo ranks, under every engine."""
    import test_measured_memory as cases

    import measured_memory as measuring

    with tempfile.TemporaryDirectory() as folder:
        measuring.save_model(Path(folder) / "model", cases.LLAMA)
        return _components(_two_ranks(Path(folder), cases, measuring), "of rank 0")


def _components(found: Iterable[tuple[str, Pairs]], which: str) -> Table:
    rows = [_row(name, pairs) for name, pairs in found]
    worst = max(abs(gap) for _, gaps, _ in rows for gap in gaps[:-1])
    lines = [(name, *(f"{gap:+.2%}" for gap in gaps), f"{size:,}") for name, gaps, size in rows]
    text = [
        f"Planned bytes divided by those of the real model, engine and optimizer, minus 1; {which}.",
        f"The worst component is off by {worst:.2%} (2 % allowed). {lab_log.machine(1, PACKAGES)}.",
        "",
        lab_log.markdown_table(("run", *PARTS, "sum", "bytes"), lines),
    ]
    return "\n".join(text), worst <= 0.02


Pairs = list[tuple[dict[str, int], dict[str, int]]]
"""Measured and planned bytes by component."""


def _row(name: str, pairs: Pairs) -> tuple[str, list[float], int]:
    gaps = [max((_gap(measured[part], planned[part]) for measured, planned in pairs), key=abs) for part in PARTS]
    sums = [(sum(measured.values()), sum(planned.values())) for measured, planned in pairs]
    return name, [*gaps, max((_gap(*each) for each in sums), key=abs)], max(measured for measured, _ in sums)


def _gap(measured: int, planned: int) -> float:
    return planned / measured - 1 if measured else float(planned > 0)


def _alone(model: Path, cases: ModuleType, measuring: ModuleType) -> Iterable[tuple[str, Pairs]]:
    """Yield one process: methods x precision x checkpointing at each length; then every method and family."""
    from accelerate.state import AcceleratorState

    def pair(folder: Path, lengths: Sequence[int], **sections: object) -> tuple[dict[str, int], dict[str, int]]:
        AcceleratorState._reset_state(True)
        plan = measuring.plan_of(folder, lengths, **sections)
        return measuring.measured(plan, lengths), measuring.predicted(plan, folder, lengths)

    for method in ("full", "lora", "qlora"):
        for precision in ("fp32", "bf16"):
            for checkpointing in (False, True):
                sections = {"method": method, "precision": precision, "parallel": {"checkpointing": checkpointing}}
                found = [pair(model, lengths, **sections) for lengths in cases.LENGTHS]
                yield f"{method}, {precision}{', recomputed' if checkpointing else ''}", found
    for method in [name for name in cases.METHODS if name not in ("full", "lora", "qlora")]:
        yield f"{method}, bf16", [pair(model, (200, 56), method=cases.METHODS[method], precision="bf16")]
    for family, fields in cases.FAMILIES.items():
        folder = model.parent / family
        measuring.save_model(folder, {**cases.NARROW, **fields, "model_type": family})
        yield f"{family}, full, bf16", [pair(folder, (100, 100), method="full", precision="bf16")]


def _two_ranks(folder: Path, cases: ModuleType, measuring: ModuleType) -> Iterable[tuple[str, Pairs]]:
    """Yield every engine over two gloo ranks."""
    import torch.multiprocessing as mp

    measuring.make_extensions_free()
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[-2:], os.environ.get("PYTHONPATH", "")])
    every = [case for case in cases.OTHERS if case[2] == "bf16"]
    arguments = (2, str(folder), cases.free_ports(len(every)), every, [200, 56])
    mp.spawn(measuring.measure_ranks, arguments, nprocs=2)
    results = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    for (engine, method, precision), pair in zip(every, results, strict=True):
        yield f"{engine} x 2, {method}, {precision}", [tuple(pair)]


TABLES: dict[str, tuple[str, Callable[[], Table]]] = {
    "published": ("Plan: predicted and published speed and memory", published),
    "memory": ("Plan: planned and measured memory, one process on the CPU", memory),
    "ranks": ("Plan: planned and measured memory, two ranks on the CPU", ranks),
}


if __name__ == "__main__":
    sys.exit(main())
