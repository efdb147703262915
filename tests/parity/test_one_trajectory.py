"""One recipe, one curve: processes, accumulation and engine never change the loss.

The reference is a hand-written torch loop that knows no packs: each document alone, the model's own attention.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cli import curve, packhorse
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.store import open_store
from tiny import TINY, write_tiny

TOLERANCE = 1e-5

SYSTEMS = {
    "1 process": ("ddp", 1, 8),
    "1 process, 4 passes": ("ddp", 1, 2),
    "2 processes": ("ddp", 2, 4),
    "2 processes, 4 passes": ("ddp", 2, 1),
    "zero2 x 2": ("zero2", 2, 2),
    "zero3 x 2": ("zero3", 2, 2),
    "fsdp2 x 2": ("fsdp2", 2, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parity")
    write_tiny(place)
    assert packhorse(place, "prepare", "tiny.yaml").code == 0
    return place


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the hand-written loop."""
    (store_folder,) = (folder / "runs" / ".data").glob("*/train")
    store = open_store(store_folder.parent, "train")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "runs" / ".builtin" / "v1" / "tokenizer")
    fields = {key: value for key, value in TINY["model"]["config"].items() if key != "model_type"}
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            **fields,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        attn_implementation="eager",
    )
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    plan = BatchPlan(store.pack_costs, 8, 42)
    losses, norms = [], []
    for step in range(TINY["steps"]):
        documents = [store.document(d) for pack in plan.packs(step) for d in store.documents_of(int(pack))]
        total, count = torch.zeros(()), 0
        for ids, supervised in documents:
            row = torch.tensor(ids.astype("int64"))[None]
            labels = row.clone()
            labels[0, ~torch.tensor(supervised.astype(bool))] = -100
            logits = model(row).logits[0, :-1]
            total = total + F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
            count += int((labels[0, 1:] != -100).sum())
        loss = total / count
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_the_curve_is_the_hand_written_loops(
    system: str, folder: Path, reference: tuple[list[float], list[float]]
) -> None:
    engine, processes, micro = SYSTEMS[system]
    name = system.replace(",", "").replace(" ", "-")
    words = [f"name={name}", f"parallel.engine={engine}", f"parallel.processes={processes}", f"batch.micro={micro}"]
    done = packhorse(folder, "train", "tiny.yaml", *words, timeout=600)
    assert done.code == 0, done.err
    losses, norms = reference
    run = folder / "runs" / name
    assert curve(run) == pytest.approx(losses, rel=TOLERANCE, abs=0)
    assert curve(run, "train/grad_norm") == pytest.approx(norms, rel=1e-4, abs=0)
    assert losses[-1] < losses[0] - 0.5, "the curve must fall, or equal curves say little"
