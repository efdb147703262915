"""`packhorse quickstart`: the main job from nothing to a tuned model, with only what Packhorse generates itself."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from packhorse.commands.evaluate import evaluate_run
from packhorse.commands.train import train
from packhorse.errors import EXIT_OK
from packhorse.evaluate.show import render
from packhorse.plan.hardware import Hardware, detect_hardware
from packhorse.plan.make_plan import run_folder_of
from packhorse.recipe.load import load_recipe
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.status import read_status

STEPS = (
    ("quickstart/full", "Full fine-tuning of a small fresh Llama on a bilingual corpus, on 2 processes"),
    ("quickstart/lora", "LoRA on that result, for a task that it has never seen"),
)


def quickstart() -> int:
    """Trains both recipes where they are not trained yet, and shows base beside tuned."""
    console = Console()
    folder = Path()
    for name, words in STEPS:
        console.rule(f"{name}: {words}")
        folder = run_folder_of(load_recipe(name))
        started = time.monotonic()
        code = _train_once(name, folder, console)
        if code != EXIT_OK:
            return code
        trained = time.monotonic()
        console.print(render(evaluate_run(open_run(str(folder)))))
        console.print(
            f"trained in {trained - started:.0f} s, evaluated in {time.monotonic() - trained:.0f} s", style="dim"
        )
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    console.rule("next")
    for line in (
        f"packhorse chat {shown}",
        f"packhorse status {shown}",
        "packhorse recipes copy qwen2.5-7b/lora my.yaml",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    return EXIT_OK


def _train_once(name: str, folder: Path, console: Console) -> int:
    status = read_status(folder) if folder.is_dir() else None
    if status is None:
        return train(name, process_overrides(detect_hardware()), None, resume=False)
    if status.state == "finished":
        console.print(f"{folder} is trained already; remove it to train again", soft_wrap=True, highlight=False)
        return EXIT_OK
    return train(str(folder), (), None, resume=True)


def process_overrides(hardware: Hardware) -> list[str]:
    """Return the override that fits the recipes' two processes to a machine with one GPU; empty elsewhere."""
    return ["parallel.processes=1"] if len(hardware.gpus) == 1 else []
