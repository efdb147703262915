"""The whole parity matrix, and its table in docs/lab-log.md: one recipe, one curve.

    python benchmarks/parity.py [--no-write] [words for pytest, such as -k lora]

Runs tests/parity with cells that hold each combination of three settings (`make test` runs some that hold each two).
Exit code: pytest's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lab_log

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
NOT_RUN = "—"
SMOKE = "loop_by_hand and fresh and zero1 and none"
# As many steps as the golden curves have, each of which is computed again and compared with the committed one.
WHOLE = {"PARITY_STEPS": "20", "PARITY_RECOMPUTE": "1"}


def main() -> int:
    """Runs the cells and writes what they left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-write", action="store_true", help="show the table, leave docs/lab-log.md as it is")
    parser.add_argument("--smoke", action="store_true", help="one cell, to see that it runs; written nowhere")
    options, words = parser.parse_known_args()
    if options.smoke:
        options.no_write, words = True, [*words, "-k", SMOKE]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        argv = [sys.executable, "-m", "pytest", "tests/parity", "-m", "matrix or not matrix", *words]
        started = time.monotonic()
        code = subprocess.run(
            argv, cwd=ROOT, env={**os.environ, **WHOLE, "PARITY_RESULTS": str(results)}, check=False
        ).returncode
        minutes = (time.monotonic() - started) / 60
        cells = (
            [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
        )
    if not cells:
        return code
    text = report(cells, minutes, failed=code != 0)
    print(text)
    if not options.no_write:
        lab_log.append("Parity: one recipe, one curve", text)
    return code


def report(cells: list[dict[str, Any]], minutes: float, failed: bool) -> str:
    """The table with what it was measured on; cells of one method and engine share a place, the worst counts."""
    found: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        found[cell["cell"]["method"], cell["cell"]["engine"]].append(cell)
    methods = list(dict.fromkeys(method for method, _ in found))
    engines = list(dict.fromkeys(engine for _, engine in found))
    rows = [[method, *(_worst(found.get((method, engine), [])) for engine in engines)] for method in methods]
    lines = [
        f"{len(cells)} runs of `packhorse train` in {minutes:.0f} min{', of which some fail' if failed else ''}:"
        " 20 steps, fp32, against a loop by hand",
        "(each document alone, eager attention, plain loss, torch's AdamW; peft, bitsandbytes).",
        "Largest relative difference of the loss / of the gradient norm, over bases, passes, checkpointing",
        f"and packing. {lab_log.machine(len(os.sched_getaffinity(0)), PACKAGES)}.",
        "",
        lab_log.markdown_table(["method", *engines], rows),
    ]
    return "\n".join(lines)


def _worst(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return NOT_RUN
    return " / ".join(f"{max(cell[figure] for cell in cells):.0e}" for figure in ("loss", "norm"))


if __name__ == "__main__":
    sys.exit(main())
