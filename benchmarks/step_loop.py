"""Real tokens per CPU second of the step loop beside a bare torch loop, Hugging Face's Trainer and TRL's SFTTrainer.

    python benchmarks/step_loop.py [--rows chat|text] [--rounds 5] [--write]

Same rows, weights, packs, thread count and type for all, each in a process of its own; they take turns, one round each,
so that whatever else the machine does falls on all alike. A ratio is the median of the rounds' ratios.
Exit code 1 where a bar is missed or the contestants do not compute the same loss.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import lab_log
from packhorse.data.prepare import prepare
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.run_folder.folder import create_run
from packhorse.workflows.prepared_data import data_facts

if TYPE_CHECKING:
    from contestants import Reading

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
PACKAGES = ("torch", "transformers", "accelerate", "trl")
LOSS_TOLERANCE = 1e-5

ROWS = {
    "chat": ("data/gsm8k_train.jsonl", "question_answer"),
    "text": ("data/lf_c4_demo.jsonl", "text"),
}


@dataclass(frozen=True)
class Contestant:
    """Who takes part, and how fast we must be beside it; `same_packs` where step losses can be compared."""

    name: str
    title: str
    bar: float | None
    same_packs: bool = True


# For --smoke: builtin rows, and a model that takes no time.
TINY = (
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=1",
    "model.config.vocab_size=2048",
    "batch.length=256",
)

OURS = Contestant("ours", "packhorse", None)
FIELD = (
    OURS,
    Contestant("bare", "bare loop, the model's own loss", 1.05),
    Contestant("bare-chunked", "bare loop, our loss and attention", 0.97),
    Contestant("trainer", "HF Trainer, packed", 1.00),
    Contestant("trl", "TRL SFTTrainer, packed", 1.80, same_packs=False),
)

Readings = dict[str, list["Reading"]]
"""Of each contestant: the warm-up step, then one a round."""


def main() -> int:
    """Measures, prints the table, and writes it down where asked to."""
    options = _options()
    # Before any child imports torch: one thread each, so that CPU seconds are not spent on waiting for each other.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    field = [one for one in FIELD if one is OURS or options.only is None or one.name in options.only]
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as folder:
        plan = make_run(Path(folder), options.rows, 1 + options.rounds * options.steps, TINY if options.smoke else ())
        readings = _measure(plan, field, options.rounds, options.steps)
    text = _describe(plan, options, field, readings)
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append(f"Step loop, {options.rows} rows", text)
    fast = options.smoke or all(_verdicts(field, readings).values())
    return 0 if fast and _loss_gap(field, readings) <= LOSS_TOLERANCE else 1


def make_run(folder: Path, rows: str, num_steps: int, more: Sequence[str] = ()) -> RunPlan:
    """Prepares the rows and makes the run folder of one process; `more`: overrides of the recipe."""
    words = [f"runs_folder={folder}", f"steps={num_steps}", *(more or real_rows(rows))]
    recipe = load_recipe(str(HERE / "step_loop.yaml"), words)
    prepared = prepare(recipe)
    facts = data_facts(prepared.folder, prepared.manifest)
    plan = make_plan(recipe, DeviceRequest(), Hardware(num_cores=1, gpus=()), facts)
    assert plan.steps_per_epoch is not None
    if num_steps >= plan.steps_per_epoch:
        raise SystemExit(f"{num_steps} steps need more rows: an epoch has {plan.steps_per_epoch}")
    create_run(plan, {"data.json": prepared.manifest.model_dump_json()})
    return plan


def real_rows(rows: str) -> list[str]:
    """Overrides: real rows and a real tokenizer where they are; a user's clone has what the quickstart makes."""
    if not SHARED.is_dir():
        return []
    path, kind = ROWS[rows]
    return [
        f"data.sources=[{{path: {SHARED / path}, format: {kind}}}]",
        f"model.tokenizer={SHARED / 'tokenizers/mistral-v3-32768'}",
    ]


def _measure(plan: RunPlan, field: Sequence[Contestant], rounds: int, steps_per_round: int) -> Readings:
    """Lets the contestants take turns."""
    with ExitStack() as children:
        pipes = {one.name: _start(children, one.name, Path(plan.run_folder), steps_per_round) for one in field}
        logs = {name: Path(plan.run_folder) / f"{name}.log" for name in pipes}
        readings = {name: [_receive(pipe, logs[name])] for name, pipe in pipes.items()}
        for round_ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                readings[name].append(_receive(pipe, logs[name]))
                speed = readings[name][-1].speed
                sys.stderr.write(f"round {round_ + 1}/{rounds}  {name:13} {speed:7.0f} tokens per CPU second\n")
        for pipe in pipes.values():
            pipe.send(False)
    return readings


def _start(children: ExitStack, name: str, run_folder: Path, steps_per_round: int) -> Connection:
    """Starts a contestant and returns the pipe of its gate; what it prints goes into RUN/NAME.log."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_contest, args=(name, run_folder, there, steps_per_round), daemon=True)
    child.start()
    there.close()
    children.callback(child.join)
    children.callback(here.close)
    return here


def _receive(pipe: Connection, log: Path) -> Reading:
    try:
        reading: Reading = pipe.recv()
    except EOFError:
        raise SystemExit(f"{log.stem} ended early:\n{log.read_text(encoding='utf-8')[-3000:]}") from None
    return reading


def _contest(name: str, run_folder: Path, pipe: Connection, steps_per_round: int) -> None:
    log = run_folder / f"{name}.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Only in the child: the parent must not carry torch.
    from contestants import run_contestant

    run_contestant(name, run_folder, pipe, steps_per_round)


def _ratios(readings: Readings, name: str) -> list[float]:
    return [ours.speed / theirs.speed for ours, theirs in zip(readings["ours"][1:], readings[name][1:])]


def _verdicts(field: Sequence[Contestant], readings: Readings) -> dict[str, bool]:
    return {one.name: median(_ratios(readings, one.name)) >= one.bar for one in field if one.bar is not None}


def _loss_gap(field: Sequence[Contestant], readings: Readings) -> float:
    """Largest distance of any first-step loss from ours."""
    ours = readings["ours"][0].loss
    return max((abs(readings[one.name][0].loss - ours) for one in field if one.same_packs), default=0.0)


def _describe(plan: RunPlan, options: argparse.Namespace, field: Sequence[Contestant], readings: Readings) -> str:
    header = ("contestant", "tokens per CPU s", "min to max", "ours ÷ it", "bar", "met", "peak RSS", "first loss")
    verdicts = _verdicts(field, readings)
    rows = [_row(one, readings, verdicts.get(one.name)) for one in field]
    counted = readings["ours"][1:]
    num_tokens, num_supervised = (
        sum(getattr(r, f"num_{kind}") for r in counted) for kind in ("tokens", "supervised_tokens")
    )
    packs, length = plan.batch.packs_per_step, plan.batch.length_tokens
    model = plan.recipe.model.config or {}
    same = [f"{name} {sum(r.num_tokens for r in kept[1:]):,}" for name, kept in readings.items()]
    notes = [
        f"Fresh Llama, hidden {model['hidden_size']}, {model['num_hidden_layers']} layers, vocabulary"
        f" {model['vocab_size']:,}, fp32; {packs} packs of {length} a step, one a pass; {options.rounds} rounds of"
        f" {options.steps} steps after one warm-up step; {num_supervised / num_tokens:.0%} of tokens supervised.",
        lab_log.machine(1, PACKAGES) + ".",
        f"First-step losses on the same packs differ by {_loss_gap(field, readings):.1e} at most"
        f" (allowed {LOSS_TOLERANCE:.0e}). Real tokens: {'; '.join(same)}.",
    ]
    return "\n".join([*notes, "", lab_log.markdown_table(header, rows)])


def _row(one: Contestant, readings: Readings, met: bool | None) -> list[str]:
    counted = readings[one.name][1:]
    speeds = [reading.speed for reading in counted]
    return [
        one.title,
        f"{median(speeds):.0f}",
        f"{min(speeds):.0f} to {max(speeds):.0f}",
        f"{median(_ratios(readings, one.name)):.2f}",
        f"{one.bar:.2f}" if one.bar is not None else "",
        {True: "yes", False: "NO", None: ""}[met],
        f"{counted[-1].peak_bytes / 2**20:,.0f} MiB",
        f"{readings[one.name][0].loss:.6f}" if one.same_packs else "other packs",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=sorted(ROWS), default="chat", help="GSM8K chats, or C4 text (all supervised)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a turn")
    parser.add_argument("--only", nargs="*", help="contestants beside ours")
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.only = 1, ["bare", "trainer", "trl"]
    return options


if __name__ == "__main__":
    sys.exit(main())
