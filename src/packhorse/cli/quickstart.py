"""`packhorse quickstart`: from nothing to a tuned model, with only what Packhorse generates."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from packhorse.cli.show.text import open_console, print_plain
from packhorse.cli.train import train
from packhorse.errors import EXIT_OK
from packhorse.evaluate.show import render
from packhorse.plan.make_plan import run_folder_of
from packhorse.plan.topology import Hardware, detect_hardware
from packhorse.recipe.load import load_recipe
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.status import read_status
from packhorse.workflows.evaluate import evaluate_run

STEPS = (
    ("quickstart/full", "full fine-tuning of a small fresh Llama on a bilingual corpus"),
    ("quickstart/lora", "LoRA on that result, for a task that it has never seen"),
)


def quickstart() -> int:
    """Train both recipes if they are not trained yet, and compare base and tuned model."""
    console = open_console()
    folder = Path()
    for name, title in STEPS:
        console.print(f"── {name}: {title} ──", style="bold")
        folder = run_folder_of(load_recipe(name))
        started = time.monotonic()
        code = _train_once(name, folder, console)
        if code != EXIT_OK:
            return code
        trained = time.monotonic()
        console.print(render(evaluate_run(open_run(str(folder)))))
        evaluated = time.monotonic()
        console.print(f"trained in {trained - started:.0f} s, evaluated in {evaluated - trained:.0f} s", style="dim")
    console.print("── next ──", style="bold")
    for line in (
        f"packhorse chat {relative(folder)}",
        f"packhorse status {relative(folder)}",
        "packhorse recipes copy qwen2.5-7b/lora my.yaml",
    ):
        print_plain(f"  {line}", console)
    return EXIT_OK


def _train_once(name: str, folder: Path, console: Console) -> int:
    status = read_status(folder) if folder.is_dir() else None
    if status is None:
        return train(name, process_overrides(detect_hardware()))
    if status.state == "finished":
        print_plain(f"{relative(folder)} is trained already; remove it to train again", console)
        return EXIT_OK
    return train(str(folder), resume=True)


def process_overrides(hardware: Hardware) -> list[str]:
    """Return the override that fits the recipes' two processes to a machine with one GPU; empty elsewhere."""
    return ["parallel.processes=1"] if len(hardware.gpus) == 1 else []
