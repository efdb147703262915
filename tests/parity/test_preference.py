"""A preference run, step by step, beside a loop by hand that knows no packs: one curve under every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from laboratory import SEED, Laboratory
from launches import ENGINES, train_forked
from torch import nn

from cli import curve, metrics
from golden import METHODS, adamw, assert_norms, exact_norm
from golden import Curve as Golden
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.recipe.load import load_recipe

STEPS, PACKS, BETA = 6, 4, 0.1
LOSS_TOLERANCE = 1e-5
NOUNS = ("parcel", "order", "refund", "invoice", "account", "letter", "tracking number", "shop")
# Low enough that losses stay near log 2, where their relative error is that of the log-probabilities.
LEARNING_RATE = 5e-4


def write_pairs(folder: Path, num_rows: int = 48) -> Path:
    """Rows in which the polite answer is chosen; lengths differ."""
    rows = [
        {
            "prompt": f"Where is my {NOUNS[number % 8]}? It is {number} days late.",
            "chosen": f"I am sorry about your {NOUNS[number % 8]}. " + "Please wait one more day. " * (number % 3),
            "rejected": f"No idea about {NOUNS[(number + 3) % 8]} {number}. " + "Go away. " * (number % 4),
        }
        for number in range(num_rows)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(laboratory: Laboratory, method: str, **sections: Any) -> Path:
    """A recipe of the laboratory with pairs in place of its rows."""
    recipe = yaml.safe_load(laboratory.recipe(method, "tiny", "mixed").read_text(encoding="utf-8"))
    recipe |= {
        "name": f"pairs-{method}",
        "objective": {"kind": "dpo", "beta": BETA},
        "data": {
            "sources": [{"path": str(write_pairs(laboratory.folder))}],
            "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
        },
        "batch": {"length": 256, "packs": PACKS},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "steps": STEPS,
        **sections,
    }
    path = laboratory.folder / f"pairs-{method}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def log_probability(model: nn.Module, document: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """Of one document's supervised tokens, from the model's logits over the document alone."""
    ids = torch.tensor(document[0].astype("int64"))
    chosen = torch.tensor(document[1].astype(bool))[1:]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return -F.cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum").double()


def golden(laboratory: Laboratory, method: str) -> Golden:
    """The curve of the loop by hand; its loss is the mean over pairs, its gradient that of the epoch's mean step."""
    recipe = load_recipe(str(write_recipe(laboratory, method)), [])
    recipe = recipe.model_copy(update={"runs_folder": str(laboratory.folder / "runs")})
    store = open_store(prepare(recipe).folder, "train")
    plan = BatchPlan(store.pack_costs, PACKS, SEED, store.in_order)
    model = METHODS[method].attach(laboratory.start("tiny", "mixed").model(None)).train()
    with torch.no_grad():
        reference = [log_probability(model, store.document(at)) for at in range(store.num_documents)]
    optimizer = adamw(model, LEARNING_RATE)
    losses, norms = [], []
    for step in range(STEPS):
        documents = np.concatenate([store.documents_of(int(pack)) for pack in plan.packs(step)]).tolist()
        ratios = [log_probability(model, store.document(at)) - reference[at] for at in documents]
        margins = torch.stack([chosen - rejected for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True)])
        total = -F.logsigmoid(BETA * margins).sum()
        (total / (store.num_documents / 2 / plan.num_steps_per_epoch)).backward()
        losses.append(total.item() / len(margins))
        norms.append(exact_norm([parameter for parameter in model.parameters() if parameter.requires_grad]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Golden(losses, norms, losses[0])


@pytest.mark.parametrize(
    ("method", "engine", "micro"),
    [("full", "ddp x 2", 1), ("lora", "fsdp2 x 2", 2), ("full", "zero3 x 2", 1), ("lora", "single", 4)],
    ids=str,
)
def test_the_curve_is_the_one_of_the_loop_by_hand(method: str, engine: str, micro: int, laboratory: Laboratory) -> None:
    expected = golden(laboratory, method)
    assert expected.losses[-1] < 0.69, "where nothing is learnt, equal curves say little"
    name = f"pairs-{method}-{engine}".replace(" ", "")
    run = train_forked(write_recipe(laboratory, method), ENGINES[engine], name, f"batch.micro={micro}")
    assert curve(run) == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert_norms(curve(run, "train/grad_norm"), expected)
    first, *_, last = metrics(run)
    assert first["proof/reference_difference"] <= 1e-6
    assert first["evaluation/accuracy"] == 0.5, "the model is its own reference"
    assert last["evaluation/accuracy"] > 0.5
