"""How much memory does preparing rows take as rows grow? Each size in a process of its own; the slope is bytes a row.

    python benchmarks/prepare_memory.py [--rows 250000 1000000] [--write]

Rows are short chats made here, each different, with the quickstart's tokenizer: copies are looked for, rows are
split and packed. Peak resident memory of the process (getrusage), of which the libraries take the same at every size.
The bar: 10 million rows in 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lab_log
from packhorse.data.prepare import prepare
from packhorse.recipe.schema import Recipe

WORDS = (
    "north",
    "south",
    "east",
    "west",
    "river",
    "stone",
    "cloud",
    "green",
    "amber",
    "quick",
    "slow",
    "seven",
    "paper",
)

MANY_ROWS = 10_000_000


def main() -> None:
    """Measures and prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000])
    words.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    words.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    words.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.one is not None:
        print(json.dumps(_prepare(given.one)))
        return
    if given.smoke:
        given.rows = [500, 1_000]
    measured = [(num_rows, *_in_a_process(num_rows)) for num_rows in sorted(given.rows)]
    table = lab_log.markdown_table(
        ["rows", "peak MiB", "CPU s", "CPU us a row"],
        [[f"{num:,}", f"{peak / 2**20:,.0f}", f"{cpu:,.0f}", f"{cpu / num * 1e6:.0f}"] for num, peak, cpu in measured],
    )
    (few, low, _), (many, high, _) = measured[0], measured[-1]
    slope = (high - low) / (many - few)
    at_many = (low + slope * (MANY_ROWS - few)) / 2**30
    text = f"{table}\n\n{slope:.0f} bytes a row; {MANY_ROWS:,} rows would take {at_many:.2f} GiB (bar 4)."
    print(text)
    if given.write:
        lab_log.append("Memory of preparing rows", text)


def _in_a_process(num_rows: int) -> tuple[int, float]:
    command = [sys.executable, __file__, "--one", str(num_rows)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    peak_bytes, cpu_seconds = json.loads(out.stdout)
    return peak_bytes, cpu_seconds


def _prepare(num_rows: int) -> tuple[int, float]:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w", encoding="utf-8") as rows:
            for number in range(num_rows):
                row = {"prompt": " ".join(draw.choices(WORDS, k=8)), "completion": f"{number} {draw.choice(WORDS)}"}
                rows.write(json.dumps(row) + "\n")
        recipe = Recipe.model_validate(
            {
                "name": "memory",
                "runs_folder": str(Path(folder) / "runs"),
                "model": {"config": {"model_type": "llama"}, "tokenizer": "builtin:tokenizer"},
                "data": {"sources": [{"path": str(file)}]},
                "optimizer": {"learning_rate": 1e-4},
                "epochs": 1,
            }
        )
        start = time.process_time()
        prepare(recipe)
        cpu_seconds = time.process_time() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, cpu_seconds


if __name__ == "__main__":
    main()
