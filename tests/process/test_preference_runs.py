"""Preference runs from rows to result: a reward model, KTO, and a kill inside the pass before training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cli import curve, metrics
from packhorse.data.packs.store import PackStore, open_store
from packhorse.plan.run_plan import read_plan
from packhorse.train import prior
from packhorse.train.prior import PriorFolder
from ranks import planned, run_ranks, trained
from tiny import write_tiny

NOUNS = ("parcel", "order", "refund", "invoice", "account")


def write_recipe(folder: Path, objective: Any, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"sources": [{"path": str(folder / "rows.jsonl")}], "split": {"train": 0.8, "validation": 0.2, "test": 0.0}}
    sections = {"optimizer": {"learning_rate": 3e-3}, "batch": {"length": 256, "packs": 4}, "steps": 4}
    return write_tiny(folder, objective=objective, data=data, **sections)


def pairs(num_rows: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Where is my {NOUNS[number % 5]} {number}?",
            "chosen": "I am sorry. " + "Please wait one more day. " * (1 + number % 3),
            "rejected": f"No idea, {number}. " + "Go away. " * (number % 4),
        }
        for number in range(num_rows)
    ]


def verdicts(num_rows: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": bool(number % 3)}
        for number, row in enumerate(pairs(num_rows))
    ]


def test_a_reward_model_opens_in_transformers_and_scores_equally(tmp_path: Path) -> None:
    run = trained(write_recipe(tmp_path, "reward", pairs()), "reward")
    losses = curve(run)
    assert losses[-1] < losses[0]
    model = AutoModelForSequenceClassification.from_pretrained(run / "model", attn_implementation="eager")
    assert model.num_labels == 1
    gaps = []
    store = _store(run, "validation")
    for row in range(store.num_documents // 2):
        ids = [torch.tensor(store.document(2 * row + role)[0].astype("int64"))[None] for role in range(2)]
        with torch.no_grad():
            chosen, rejected = (model(each).logits.item() for each in ids)
        gaps.append(chosen - rejected)
    assert metrics(run)[-1]["evaluation/margin"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert metrics(run)[-1]["evaluation/accuracy"] == np.mean(np.array(gaps) > 0)


def test_ktos_baseline_is_that_of_the_step_for_any_ranks_and_micro_batches(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"kind": "kto", "beta": 0.5}, verdicts())
    one, two = trained(recipe, "one", "batch.micro=4"), trained(recipe, "two", "parallel.processes=2", "batch.micro=1")
    baselines = curve(one, "kto/z0")
    assert max(baselines) > 0, "a baseline of 0 is equal for everyone"
    assert curve(two, "kto/z0") == pytest.approx(baselines, rel=1e-4)
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    assert curve(two, "train/grad_norm") == pytest.approx(curve(one, "train/grad_norm"), rel=1e-4)


def test_a_run_that_is_killed_in_the_pass_before_training_resumes_with_equal_bits(tmp_path: Path) -> None:
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "killed").mkdir()
    unbroken = _planned(tmp_path / "unbroken")
    assert [record["exit_code"] for record in run_ranks(unbroken, before=_small_blocks)] == [0]
    killed = _planned(tmp_path / "killed")
    assert run_ranks(killed, before=_killed_after_a_block) == []
    assert list((tmp_path / "killed").rglob("block-*.npz"))
    assert [record["exit_code"] for record in run_ranks(killed, attempt=2, before=_small_blocks)] == [0]
    for name in ("train/loss", "train/grad_norm", "preference/margin", "evaluation/loss"):
        assert curve(killed, name) == curve(unbroken, name), name
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (killed, unbroken)]
    assert weights[0] == weights[1]


def test_another_model_as_reference_is_loaded_first(tmp_path: Path) -> None:
    first = trained(write_recipe(tmp_path, "orpo", pairs()), "first")
    objective = {"kind": "dpo", "reference": {"path": str(first / "model")}}
    run = trained(write_recipe(tmp_path, objective, pairs()), "second")
    start, *_ = metrics(run)
    assert "proof/reference_difference" not in start, "the model that trains is not its reference"
    expected = metrics(first)[-1]["evaluation/chosen_logp"]
    reference = start["evaluation/chosen_logp"] - start["evaluation/kl"]
    assert reference == pytest.approx(expected, rel=1e-4)


def _planned(folder: Path) -> Path:
    return planned(write_recipe(folder, "dpo", pairs()), "run")


def _small_blocks(run: Path, rank: int) -> None:
    prior.BLOCK_PACKS = 1  # type: ignore[misc]


def _killed_after_a_block(run: Path, rank: int) -> None:
    _small_blocks(run, rank)
    write = PriorFolder.write_block

    def write_and_die(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    PriorFolder.write_block = write_and_die  # type: ignore[method-assign]


def _store(run: Path, split: str) -> PackStore:
    data = read_plan(run).data
    assert data is not None
    return open_store(Path(data.folder), split)
