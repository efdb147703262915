"""Real tokens per second of each engine at 1 and 2 processes, beside a bare torch loop and TRL's SFTTrainer.

    python benchmarks/engines.py [--steps 6] [--write]

Same rows, packs, weights and type for all; one thread a process. Ours through `packhorse train`, the peers through
`accelerate launch`, one after the other in one run. Two steps of warm-up are not counted. Wall seconds: run it on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import lab_log
from step_loop import HERE, TINY, real_rows

BIN = Path(sys.executable).parent
WARM_UP = 2
ENGINES = {
    1: ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2"),
    2: ("ddp", "zero1", "zero2", "zero3", "fsdp2"),
}
PEERS = {
    "bare-chunked": "bare loop, our loss and attention",
    "bare": "bare loop, the model's own loss",
    "trl": "TRL SFTTrainer",
}
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "trl")


def main() -> int:
    """Measures, prints the table, and writes it down where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps that are counted")
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    options = parser.parse_args()
    engines, peers, more = (dict(ENGINES), list(PEERS), real_rows("chat"))
    if options.smoke:
        engines, peers, more, options.steps = {1: ("ddp",)}, ["bare-chunked"], list(TINY), 1
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as name:
        speeds = _measure(Path(name), WARM_UP + options.steps, engines, peers, more)
    rows = [_row(who, speeds) for who in (*dict.fromkeys(e for names in engines.values() for e in names), *peers)]
    header = ("engine", "1 process", "÷ bare", "÷ TRL", "2 processes", "÷ bare", "÷ TRL")
    text = (
        "Fresh Llama of 21.5 million parameters, full fine-tuning, fp32, 4 packs of 1,024 a step, one thread a process;"
        f" real tokens per second, medians of {options.steps} steps.\n{lab_log.machine(1, PACKAGES)}.\n\n"
        + lab_log.markdown_table(header, rows)
    )
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Engines: tokens per second", text)
    return 0


def _measure(
    folder: Path, num_steps: int, engines: dict[int, tuple[str, ...]], peers: Sequence[str], more: Sequence[str]
) -> dict[tuple[str, int], float]:
    speeds = {}
    for processes, names in engines.items():
        for engine in names:
            run = _train(folder, engine, processes, num_steps, more)
            speeds[engine, processes] = _ours(run)
            sys.stderr.write(f"{engine} x {processes}: {speeds[engine, processes]:.0f} tokens/s\n")
        for peer in peers:
            speeds[peer, processes] = _peer(folder / "runs" / f"ddp-{processes}", peer, processes)
            sys.stderr.write(f"{peer} x {processes}: {speeds[peer, processes]:.0f} tokens/s\n")
    return speeds


def _train(folder: Path, engine: str, processes: int, num_steps: int, more: Sequence[str]) -> Path:
    words = [f"name={engine}-{processes}", f"runs_folder={folder / 'runs'}", f"steps={num_steps}", "batch.packs=4"]
    words += [f"parallel.engine={engine}", f"parallel.processes={processes}", *more]
    _run([str(BIN / "packhorse"), "train", str(HERE / "step_loop.yaml"), *words], processes)
    return folder / "runs" / f"{engine}-{processes}"


def _ours(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return median(line["speed/tokens_per_second"] for line in lines if line["step"] > WARM_UP)


def _peer(run: Path, name: str, processes: int) -> float:
    config = HERE.parent / "accelerate_configs" / "ddp.yaml"
    words = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0"]
    _run([str(BIN / "accelerate"), "launch", *words, str(HERE / "peer.py"), name, str(run)], processes)
    logs = [
        [json.loads(line) for line in (run / f"{name}-{rank}.jsonl").read_text(encoding="utf-8").splitlines()]
        for rank in range(processes)
    ]
    steps = range(WARM_UP, len(logs[0]))
    tokens = [sum(log[step]["tokens"] for log in logs) for step in steps]
    seconds = [max(log[step]["time"] for log in logs) - max(log[step - 1]["time"] for log in logs) for step in steps]
    return median(count / spent for count, spent in zip(tokens, seconds))


def _run(argv: Sequence[str], processes: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    # The plan gives a process as many threads as it sees cores.
    pinned = ["taskset", "-c", ",".join(map(str, range(processes))), *argv]
    done = subprocess.run(pinned, check=False, env=environment, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(argv)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")


def _row(who: str, speeds: dict[tuple[str, int], float]) -> list[str]:
    cells = [PEERS.get(who, who)]
    for processes in ENGINES:
        speed = speeds.get((who, processes))
        if speed is None:
            cells += ["", "", ""]
            continue
        cells.append(f"{speed:,.0f}")
        for peer in ("bare-chunked", "trl"):
            cells.append(f"{speed / speeds[peer, processes]:.2f}" if (peer, processes) in speeds else "")
    return cells


if __name__ == "__main__":
    sys.exit(main())
