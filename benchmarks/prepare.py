"""How dear is preparing rows? One batched tokenizer call is the ceiling, TRL's preparation of the same rows the peer.

    python benchmarks/prepare.py --rows FILE --tokenizer FOLDER [--rounds 3] [--write]
    python benchmarks/prepare.py --smoke

FILE holds question and answer rows (JSONL), FOLDER a tokenizer with a chat template. All run in one process, in turn,
round by round; CPU seconds of the whole process, threads included, medians of the rounds. The tokenizer call gets text
that is rendered already; ours starts from the file and ends with packs on disk: duplicates, split, proofs and ledger
included.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import lab_log
from packhorse.data.prepare import prepare
from packhorse.data.render.render import load_tokenizer, make_renderer
from packhorse.data.render.serving import saved_form
from packhorse.quickstart.files import materialise
from packhorse.recipe.schema import DataSection, Recipe, Source

Figures = tuple[float, float, int]
"""CPU seconds, wall seconds, tokens."""
Chat = list[dict[str, str]]
ROWS_A_CALL = 1000
CEILING = "one batched tokenizer call"
LOADING = "loading the tokenizer, and again as it will be saved"
OURS = "packhorse prepare, cold"
PEER = "TRL SFTTrainer's preparation"


def main() -> None:
    """Measures and prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rows", type=Path)
    words.add_argument("--tokenizer", type=Path)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    words.add_argument("--smoke", action="store_true", help="a few seconds on made-up rows, without the peer")
    given = words.parse_args()
    if not given.smoke and None in (given.rows, given.tokenizer):
        words.error("--rows and --tokenizer are needed, or --smoke")
    datasets.disable_progress_bars()
    datasets.disable_caching()
    logging.disable(logging.WARNING)

    with tempfile.TemporaryDirectory() as folder:
        if given.smoke:
            given.rounds = 1
            given.rows, given.tokenizer = _made_up(Path(folder)), materialise("tokenizer", Path(folder))
        contestants = _contestants(given.rows, given.tokenizer, Path(folder), with_peer=not given.smoke)
        rounds = [{name: _timed(run) for name, run in contestants.items()} for _ in range(given.rounds)]
        num_rows = sum(1 for _ in given.rows.open("rb"))
    table = _table(rounds)
    text = (
        f"{given.rows.name}, {num_rows:,} rows, tokenizer {given.tokenizer.name}, medians of {given.rounds} rounds;"
        f" {lab_log.machine(2, ('tokenizers', 'transformers', 'trl'))}\n\n{table}"
    )
    print(text)
    if given.write:
        lab_log.append("Preparing rows", text)


def _contestants(rows: Path, tokenizer_folder: Path, folder: Path, with_peer: bool) -> dict[str, Callable[[], int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chats = [_chat(json.loads(line)) for line in rows.read_bytes().split(b"\n") if line.strip()]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    recipe = _recipe(rows, tokenizer_folder, folder)
    found = {
        CEILING: lambda: _call(tokenizer, rendered),
        LOADING: lambda: _load(tokenizer_folder),
        OURS: lambda: _prepare_cold(recipe, folder),
        "packhorse prepare, warm": lambda: _num_tokens(recipe),
    }
    return found | ({PEER: _trl(rows, tokenizer)} if with_peer else {})


def _made_up(folder: Path) -> Path:
    """A file of 500 questions and answers."""
    path = folder / "rows.jsonl"
    rows = ({"question": f"What is {number} and 1?", "answer": f"{number + 1}."} for number in range(500))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _timed(run: Callable[[], int]) -> Figures:
    wall, cpu = time.perf_counter(), time.process_time()
    num_tokens = run()
    return time.process_time() - cpu, time.perf_counter() - wall, num_tokens


def _chat(row: dict[str, str]) -> Chat:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> int:
    starts = range(0, len(texts), ROWS_A_CALL)
    calls = [tokenizer(texts[at : at + ROWS_A_CALL], add_special_tokens=False)["input_ids"] for at in starts]
    return sum(len(ids) for call in calls for ids in call)


def _load(folder: Path) -> int:
    # As `prepare` does it: without the cycle collector, whose passes take twice as long as the rest.
    gc.disable()
    tokenizer = load_tokenizer(folder, "tokenizer")
    make_renderer(tokenizer, folder, DataSection(sources=[Source(path="none")]), chats=True)
    saved_form(tokenizer)
    gc.enable()
    return 0


def _recipe(rows: Path, tokenizer: Path, folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "prepare",
            "runs_folder": str(folder / "runs"),
            "model": {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer)},
            "data": {"sources": [{"path": str(rows)}]},
            "optimizer": {"learning_rate": 1e-4},
            "epochs": 1,
        }
    )


def _prepare_cold(recipe: Recipe, folder: Path) -> int:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return _num_tokens(recipe)


def _num_tokens(recipe: Recipe) -> int:
    return prepare(recipe).manifest.ledger.rows_in.tokens


def _trl(rows: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[], int]:
    # Only here: its import costs 10 s of CPU.
    from trl import SFTConfig, SFTTrainer

    def messages(row: dict[str, str]) -> dict[str, Chat]:
        return {"messages": _chat(row)}

    warnings.simplefilter("ignore")
    settings = SFTConfig(
        output_dir=tempfile.gettempdir(),
        packing=True,
        max_length=2048,
        assistant_only_loss=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    # What `_prepare_dataset` asks of the trainer; a whole one would need a model.
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=False)

    def run() -> int:
        loaded = datasets.load_dataset("json", data_files=str(rows), split="train")
        chats = loaded.map(messages, remove_columns=loaded.column_names)
        packed = SFTTrainer._prepare_dataset(trainer, chats, tokenizer, settings, True, None, "train")
        return sum(map(sum, packed["seq_lengths"]))

    return run


def _table(rounds: list[dict[str, Figures]]) -> str:
    """Medians over the rounds; a ratio is taken within its round, as the machine's speed drifts."""
    for figures in rounds:
        # The call has its tokenizer loaded already, and so has TRL: without loading, the three are alike.
        (cpu, wall, num_tokens), loading = figures[OURS], figures.pop(LOADING)
        figures[f"{OURS}, without loading the tokenizer"] = cpu - loading[0], wall - loading[1], num_tokens
    rows = []
    for name in rounds[0]:
        cpu, wall, rate = (statistics.median(values) for values in zip(*(_three(figures[name]) for figures in rounds)))
        ratio = statistics.median(_three(figures[name])[2] / _three(figures[CEILING])[2] for figures in rounds)
        rows.append([name, f"{cpu:.2f}", f"{wall:.2f}", f"{rate:,.0f}", f"{ratio:.2f}"])
    return lab_log.markdown_table(["what", "CPU s", "wall s", "tokens per CPU-s", "of the ceiling"], rows)


def _three(figures: Figures) -> tuple[float, float, float]:
    cpu, wall, num_tokens = figures
    return cpu, wall, num_tokens / cpu


if __name__ == "__main__":
    main()
