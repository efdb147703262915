"""Verdicts: CPU seconds of the statistics of an evaluation of 10,000 rows, for each kind of metric.

    python benchmarks/verdicts.py [--write]

Two simulated models, near copies absent. The figures of labels have 77 labels, as many as BANKING77. Exit code 1 where
all metrics that rows with labels get take more than 5 s together.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

import lab_log
from packhorse.evaluate.metrics.labels import f1_sums, macro_f1, weighted_f1
from packhorse.evaluate.statistics.calibration import calibration_error, calibration_sums
from packhorse.evaluate.statistics.paired import Kind, Pairs, paired_test
from packhorse.evaluate.statistics.whole_set import compare_figures

NUM_ROWS, NUM_LABELS, LIMIT_SECONDS = 10_000, 77, 5.0


def main() -> int:
    options = _options()
    num_rows = 200 if options.smoke else NUM_ROWS
    generator = np.random.default_rng(0)
    expected = generator.integers(0, NUM_LABELS, num_rows)
    models = [
        np.where(generator.random(num_rows) < share, expected, generator.integers(0, NUM_LABELS, num_rows))
        for share in (0.6, 0.62)
    ]
    right = [(model == expected).astype(float) for model in models]
    graded = [generator.random(num_rows) for _ in models]
    sums = [f1_sums(expected, model, NUM_LABELS) for model in models]
    bins = [calibration_sums(generator.random(num_rows), each) for each in right]

    def by_row(values: list[np.ndarray], kind: Kind) -> Callable[[], object]:
        return lambda: paired_test(Pairs.of(*values), kind)

    cases: dict[str, tuple[Callable[[], object], int]] = {
        "0 or 1, exact McNemar": (by_row(right, "binary"), 3),
        "graded, sign-flip and BCa": (by_row(graded, "graded"), 1),
        "macro and weighted F1": (lambda: compare_figures(*sums, range(num_rows), 1, [macro_f1, weighted_f1]), 1),
        "calibration error": (lambda: compare_figures(*bins, range(num_rows), 1, [calibration_error]), 1),
    }
    seconds = {}
    for name, (compare, _) in cases.items():
        start = time.process_time()
        compare()
        seconds[name] = time.process_time() - start
    total = sum(seconds[name] * count for name, (_, count) in cases.items())
    rows = [[name, str(count), f"{seconds[name]:.2f}"] for name, (_, count) in cases.items()]
    rows.append(["rows with labels, all metrics", "7", f"{total:.2f}"])
    note = f"{num_rows:,} rows, {NUM_LABELS} labels, two models; {lab_log.machine(1, ['numpy', 'scipy'])}."
    text = "\n".join([note, "", lab_log.markdown_table(["metric", "number", "CPU s each"], rows)])
    print(text)
    if options.write:
        lab_log.append("Seconds of the verdicts", text)
    return int(total > LIMIT_SECONDS and not options.smoke)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="few rows, to see that it runs; judges nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
