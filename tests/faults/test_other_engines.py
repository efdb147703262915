"""A run goes on on other processes and under another engine as if it had never moved; what cannot is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import ranks
from cli import curve, metrics, packhorse
from packhorse.data.packs.store import open_store
from packhorse.plan.run_plan import read_plan, write_plan
from packhorse.run_folder.checkpoints.manifest import read_manifest
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.status import read_status, write_status
from tiny import TINY, write_tiny

STEPS, PACKS = 8, 8
ENGINES = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
METHODS: dict[str, Any] = {
    "full": "full",
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.0},  # masks are drawn by rank
    "qlora": {"kind": "qlora", "rank": 4, "dropout": 0.0},
}


@dataclass(frozen=True)
class Leg:
    """A part of a run: from one step to the next checkpoint, under this engine on so many processes."""

    first: int
    engine: str
    processes: int

    def words(self) -> tuple[str, str]:
        return f"parallel.engine={self.engine}", f"parallel.processes={self.processes}"


FULL = [Leg(0, "ddp", 1), Leg(2, "zero2", 2), Leg(4, "fsdp2", 4), Leg(6, "zero3", 2)]
LORA = [Leg(0, "fsdp2", 2), Leg(3, "zero3", 2), Leg(6, "ddp", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model; widths of 64 at least, as bitsandbytes quantises blocks of 64 weights."""
    place = tmp_path_factory.mktemp("engines")
    shape = {key: value for key, value in TINY["model"]["config"].items() if key != "model_type"}
    torch.manual_seed(0)
    fields = {**shape, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(place / "base")
    return place


def recipe(folder: Path, method: str, every_steps: int) -> Path:
    return write_tiny(
        folder,
        model={"path": str(folder / "base"), "tokenizer": "builtin:tokenizer"},
        method=METHODS[method],
        batch={"length": 256, "packs": PACKS},
        checkpoint={"every_steps": every_steps, "keep_last": STEPS},
        evaluation={"max_answered_rows": 0},
        steps=STEPS,
    )


def trained(folder: Path, method: str, name: str, leg: Leg, every_steps: int = STEPS) -> Path:
    """A new run to its end."""
    return ranks.trained(recipe(folder, method, every_steps), name, *leg.words())


def stop_at(run: Path, step: int) -> None:
    """Makes a finished run one that was stopped at a checkpoint."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name[-6:]) > step:
            shutil.rmtree(checkpoint)
    for result in ("model", "adapter"):
        shutil.rmtree(run / result, ignore_errors=True)
    status = read_status(run)
    assert status is not None
    write_status(run, status.model_copy(update={"state": "stopped", "step": step}))


def moved(folder: Path, method: str, legs: list[Leg]) -> tuple[Path, Path]:
    """A run that went through all legs, and one that only ever knew the first; the last move is typed by a user."""
    every_steps = legs[1].first
    unbroken = trained(folder, method, f"{method}-unbroken", legs[0], every_steps)
    run = unbroken.with_name(f"{method}-moved")
    shutil.copytree(unbroken, run)
    write_plan(open_run(str(run)), run)
    for attempt, leg in enumerate(legs[1:-1], start=2):
        stop_at(run, leg.first)
        ranks.resumed(run, attempt, *leg.words())
    stop_at(run, legs[-1].first)
    done = packhorse(folder, "train", str(run), "--resume", *legs[-1].words())
    assert done.code == 0, done.err
    return run, unbroken


@pytest.fixture(scope="module")
def full(folder: Path) -> tuple[Path, Path]:
    return moved(folder, "full", FULL)


@pytest.fixture(scope="module")
def lora(folder: Path) -> tuple[Path, Path]:
    return moved(folder, "lora", LORA)


@pytest.mark.parametrize(("runs", "legs"), [("full", FULL), ("lora", LORA)], ids=["full", "lora"])
def test_the_curve_is_that_of_a_run_which_never_moved(
    runs: str, legs: list[Leg], request: pytest.FixtureRequest
) -> None:
    run, unbroken = request.getfixturevalue(runs)
    expected = curve(unbroken)
    assert len(expected) == STEPS
    assert curve(run) == pytest.approx(expected, rel=1e-5)
    assert curve(run, "train/grad_norm") == pytest.approx(curve(unbroken, "train/grad_norm"), rel=1e-4)
    assert curve(run, "train/supervised_tokens") == curve(unbroken, "train/supervised_tokens")
    assert expected[-1] < expected[0]
    written = {}
    for checkpoint in (run / "checkpoints").glob("step-*"):
        manifest = read_manifest(checkpoint)
        assert manifest is not None
        written[manifest.run.step] = (manifest.run.engine, manifest.run.world_size)
    starts = {leg.first: (leg.engine, leg.processes) for leg in legs}
    assert [written[step] for step in sorted(written)][: len(legs)] == list(starts.values())[: len(written)]


def test_each_plan_is_kept_and_the_last_says_what_changed(full: tuple[Path, Path]) -> None:
    run, _ = full
    kept = [read_plan(run / f"plan-{number}.json") for number in (1, 2, 3)]
    now = read_plan(run)
    assert [(plan.topology.engine, plan.topology.world_size) for plan in (*kept, now)] == [
        (leg.engine, leg.processes) for leg in FULL
    ]
    assert {plan.batch.packs_per_step for plan in (*kept, now)} == {PACKS}
    assert [decision.reason for decision in now.decisions if decision.name == "resume"] == [
        "after attempt 1: parallel.engine ddp -> zero2, processes 1 -> 2",
        "after attempt 2: parallel.engine zero2 -> fsdp2, processes 2 -> 4",
        "after attempt 3: parallel.engine fsdp2 -> zero3, processes 4 -> 2",
    ]


def test_no_checkpoint_of_any_engine_holds_a_pickle(full: tuple[Path, Path], lora: tuple[Path, Path]) -> None:
    files = [path for run in (*full, *lora) for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("parallel.processes=9",), ["batch.packs is 8, and there are 9 processes", "set batch.packs to 9"]),
        (("optimizer.learning_rate=0.1",), ["the resumed run was given optimizer.learning_rate=0.1", "another name"]),
        (("batch.packs=4",), ["the resumed run was given batch.packs=4"]),
        (("parallel.engine=single",), ["parallel.engine is single, and the run has 2 processes"]),
        (("parallel.engine=zero3_nvme", "parallel.nvme=/tmp"), ["zero3_nvme"]),
    ],
    ids=["fewer packs than processes", "learning rate", "packs", "engine", "nvme"],
)
def test_what_cannot_go_on_is_refused_before_anything_starts(
    words: tuple[str, ...], said: list[str], full: tuple[Path, Path], folder: Path
) -> None:
    run = folder / "runs" / "refused"
    if not run.exists():
        shutil.copytree(full[0], run)
        stop_at(run, 6)
    plan, attempts = (run / "plan.json").read_bytes(), len(list((run / "logs").glob("attempt-*")))
    done = packhorse(folder, "train", str(run), "--resume", *words)
    assert done.code == 2
    assert all(part in done.err for part in (*said, "why:", "fix:")), done.err
    assert (run / "plan.json").read_bytes() == plan
    assert len(list((run / "logs").glob("attempt-*"))) == attempts


# --- what a checkpoint holds, read without us -------------------------------------------------------------------------


def plain_model(folder: Path, checkpoint: Path, method: str) -> nn.Module:
    """As anybody would load it: transformers and peft alone."""
    if method == "full":
        model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.float32)
        return model.eval()
    from peft import PeftModel

    quantized: dict[str, Any] = {}
    if method == "qlora":
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
        )
        quantized = {"quantization_config": bits, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **quantized)
    return PeftModel.from_pretrained(base, str(checkpoint / "adapter")).eval()


def plain_loss(model: Any, run: Path) -> float:
    """Nats per supervised token of the validation rows, one document at a time."""
    data = read_plan(run).data
    assert data is not None
    store = open_store(Path(data.folder), "validation")
    total, count = 0.0, 0
    with torch.no_grad():
        for index in store.packs.tolist():
            ids, mask = (torch.tensor(part.astype("int64")) for part in store.document(index))
            labels = torch.where(mask[1:] == 1, ids[1:], -100)
            logits = model(ids[None]).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def check_reloaded(folder: Path, run: Path, method: str) -> None:
    (said,) = [line["evaluation/loss"] for line in metrics(run) if "evaluation/loss" in line and line["step"] == STEPS]
    model = plain_model(folder, run / "checkpoints" / f"step-{STEPS:06d}", method)
    assert plain_loss(model, run) == pytest.approx(said, rel=1e-6)


@pytest.fixture(scope="module")
def zero1_qlora(folder: Path) -> Path:
    return trained(folder, "qlora", "zero1-qlora", Leg(0, "zero1", 2))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("engine", "method", "find"),
    [
        ("ddp", "full", lambda get: get("full")[1]),
        ("zero1", "qlora", lambda get: get("zero1_qlora")),
        ("zero3", "full", lambda get: get("full")[0]),
        ("fsdp2", "lora", lambda get: get("lora")[1]),
        ("ddp", "lora", lambda get: get("lora")[0]),
    ],
    ids=["ddp full", "zero1 qlora", "zero3 full", "fsdp2 lora", "ddp lora"],
)
def test_a_checkpoint_reloads_to_the_loss_that_training_measured(
    engine: str, method: str, find: Callable[[Callable[[str], Any]], Path], folder: Path, request: pytest.FixtureRequest
) -> None:
    run = find(request.getfixturevalue)
    assert read_plan(run).topology.engine == engine
    check_reloaded(folder, run, method)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_and_method_reloads(engine: str, method: str, folder: Path) -> None:
    run = trained(folder, method, f"{engine}-{method}", Leg(0, engine, 2))
    check_reloaded(folder, run, method)


def test_states_in_8_bits_stay_with_the_engine_that_cut_them(folder: Path, full: tuple[Path, Path]) -> None:
    run = folder / "runs" / "eight"
    shutil.copytree(full[0], run)
    stop_at(run, 6)
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["optimizer"]["name"] = "adamw_8bit"
    (run / "plan.json").write_text(json.dumps(plan))
    done = packhorse(folder, "train", str(run), "--resume", "parallel.engine=zero2", "parallel.processes=2")
    assert done.code == 2
    assert "was written under fsdp2 on 4 processes, and zero2 on 2 would resume from it" in done.err
