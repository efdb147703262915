"""Seconds from the command to the first finished optimizer step: `packhorse train` beside `trl sft`.

    python benchmarks/start_up.py [--rounds 3] [--write]

Same model (a small Llama), tokenizer, rows, length and type; one process on the CPU. Cold: rows are not prepared yet,
and TRL has nothing cached. Warm: a second run on the same rows. They take turns. Exit code 1 where the bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import yaml

import lab_log
from packhorse.quickstart.files import materialise

BAR = 0.7
BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 600
LENGTH_TOKENS, PACKS_PER_STEP = 512, 4
OURS, TRL = "packhorse train", "trl sft"
COLD, WARM = "cold", "warm"

MAKE_MODEL = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
sizes = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""

Seconds = dict[tuple[str, str], list[float]]
"""By contestant and state: one a round."""


def main() -> int:
    """Measures, prints the table, and writes it down where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    options = parser.parse_args()
    if options.smoke:
        return _smoke()
    seconds: Seconds = {(who, state): [] for who in (OURS, TRL) for state in (COLD, WARM)}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as folder:
            _round(Path(folder), seconds)
    ratios = {state: median(seconds[OURS, state]) / median(seconds[TRL, state]) for state in (COLD, WARM)}
    text = _describe(seconds, ratios, options.rounds)
    sys.stdout.write(text + "\n")
    if options.write:
        lab_log.append("Start-up: from the command to the first step", text)
    return 0 if max(ratios.values()) <= BAR else 1


def _smoke() -> int:
    """The first finished step of ours alone, once."""
    with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as name:
        seconds = _start_ours(_made(Path(name)), COLD)
    sys.stdout.write(lab_log.markdown_table(("state", OURS), [[COLD, f"{seconds:.1f}"]]) + "\n")
    return 0


def _round(folder: Path, seconds: Seconds) -> None:
    _made(folder)
    for state, who in itertools.product((COLD, WARM), (OURS, TRL)):
        start = _start_ours if who == OURS else _start_trl
        seconds[who, state].append(start(folder, state))
        sys.stderr.write(f"{state} {who}: {seconds[who, state][-1]:.1f} s\n")


def _made(folder: Path) -> Path:
    """The folder, with the model, the tokenizer and the rows that both take."""
    tokenizer = materialise("tokenizer", folder / "files")
    rows = materialise("core.messages.jsonl", folder / "files")
    subprocess.run([sys.executable, "-c", MAKE_MODEL, str(tokenizer), str(folder / "model")], check=True)
    (folder / "rows").mkdir()
    shutil.copyfile(rows, folder / "rows" / "train.jsonl")
    return folder


def _start_ours(folder: Path, name: str) -> float:
    recipe = {
        "name": name,
        "model": {"path": str(folder / "model")},
        "method": "full",
        "data": {"sources": [{"path": str(folder / "rows" / "train.jsonl")}], "split": {"train": 1.0}},
        "batch": {"length": LENGTH_TOKENS, "packs": PACKS_PER_STEP, "micro": 1},
        "optimizer": {"learning_rate": 1e-4},
        "steps": 200,
        "precision": "fp32",
        "parallel": {"processes": 1},
        "track": {"wandb": "off"},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    figures = folder / "runs" / name / "metrics.jsonl"

    def stepped() -> bool:
        lines = figures.read_text(encoding="utf-8").splitlines() if figures.is_file() else []
        return any(json.loads(line).get("step", 0) >= 1 for line in lines)

    return _until(stepped, [str(BIN / "packhorse"), "train", f"{name}.yaml"], folder, {})


def _start_trl(folder: Path, name: str) -> float:
    words = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows",
        "output_dir": folder / f"trl-{name}",
        "max_length": LENGTH_TOKENS,
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": PACKS_PER_STEP,
        "learning_rate": 1e-4,
        "max_steps": 200,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "assistant_only_loss": True,
        "save_strategy": "no",
        "report_to": "none",
        "attn_implementation": "sdpa",
    }
    argv = [str(BIN / "trl"), "sft", *(str(part) for key, value in words.items() for part in (f"--{key}", value))]
    log = folder / f"trl-{name}.log"
    return _until(lambda: "'loss'" in log.read_text("utf-8", "replace"), argv, folder, {"log": str(log)})


def _until(done: object, argv: Sequence[str], folder: Path, options: Mapping[str, str]) -> float:
    """Wall seconds until `done()`; then the command and all that it started are ended."""
    log = Path(options.get("log", folder / "ours.log"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        began = time.monotonic()
        child = subprocess.Popen(argv, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while not done():  # type: ignore[operator]
                if child.poll() is not None or time.monotonic() - began > TIMEOUT_SECONDS:
                    raise SystemExit(f"{argv[0]} made no step:\n{log.read_text('utf-8', 'replace')[-3000:]}")
                time.sleep(0.02)
            return time.monotonic() - began
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first: our launcher ends its ranks, which are in a session of their own."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=15)
            return


def _describe(seconds: Seconds, ratios: Mapping[str, float], rounds: int) -> str:
    rows = [
        [
            state,
            *(
                f"{median(seconds[who, state]):.1f} ({min(seconds[who, state]):.1f}-{max(seconds[who, state]):.1f})"
                for who in (OURS, TRL)
            ),
            f"{ratios[state]:.2f}",
            f"{BAR}",
            "yes" if ratios[state] <= BAR else "NO",
        ]
        for state in (COLD, WARM)
    ]
    head = (
        f"Llama of 256 x 4 layers, the quickstart's core rows as chats, T {LENGTH_TOKENS}, {PACKS_PER_STEP} packs a"
        f" step, fp32, one process; wall seconds, medians of {rounds} rounds."
    )
    machine = lab_log.machine(os.cpu_count() or 1, ("torch", "transformers", "accelerate", "trl"))
    return f"{head}\n{machine}.\n\n{lab_log.markdown_table(('state', OURS, TRL, 'ours ÷ TRL', 'bar', 'met'), rows)}"


def _span(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})"


if __name__ == "__main__":
    sys.exit(main())
