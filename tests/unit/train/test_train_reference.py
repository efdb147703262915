"""The pass before training: what it computes, where it resumes, and damaged values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from packhorse.data.packs.store import PackStore, open_store
from packhorse.train import prior
from packhorse.train.prior import PriorFolder
from packhorse.train.reference import REFERENCE, reference_pass
from packhorse.train.validation import StorePasses
from preference_cases import OneProcess, packed, policy_of
from prepared import write_prepared


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture
def store(tmp_path: Path) -> PackStore:
    generator = np.random.default_rng(1)
    documents: Any = []
    for length in generator.integers(4, 30, 24).tolist():
        documents.append((generator.integers(5, 97, length).tolist(), [0, 0] + [1] * (length - 2), {}))
    return open_store(write_prepared(tmp_path / "data", {"train": documents}, vocab_size=97), "train")


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """A model with transformers' own attention, and the same as it trains."""
    plain, _ = policy_of(AutoModelForCausalLM)
    return plain, packed(plain)


def passes(store: PackStore, until: int | None = None) -> StorePasses:
    """Passes of one pack; killed before pass `until`."""
    count: Iterator[int] = iter(range(10_000))

    def before_pass() -> None:
        if next(count) == until:
            raise KilledError

    return StorePasses(store, 1, 0, 1, before_pass)


def run(folder: PriorFolder, model: nn.Module, made: StorePasses) -> None:
    engine: Any = OneProcess(model)
    engine.control = None
    reference_pass(folder, engine, made, None)


def test_values_are_those_of_each_document_alone(
    store: PackStore, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    plain, ours = models
    folder = PriorFolder.beside(tmp_path, {"case": 1})
    before = torch.random.get_rng_state()
    run(folder, ours.train(), passes(store))
    assert torch.equal(torch.random.get_rng_state(), before), "the order of training must not depend on this pass"
    assert ours.training
    found = folder.load(REFERENCE)
    for at in range(store.num_documents):
        ids, mask = store.document(at)
        row = torch.tensor(ids.astype("int64"))
        with torch.no_grad():
            logits = plain(row[None], use_cache=False).logits[0, :-1]
        labels = torch.where(torch.tensor(mask.astype(bool)), row, -100)[1:]
        expected = -F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        assert found[at] == pytest.approx(expected, rel=1e-5)


def test_a_killed_pass_resumes_after_its_last_block_with_equal_bits(
    store: PackStore, models: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior, "BLOCK_PACKS", 2)
    _, ours = models
    assert store.num_packs >= 7
    unbroken, killed = (PriorFolder.beside(tmp_path, {"case": case}) for case in ("unbroken", "killed"))
    run(unbroken, ours, passes(store))
    with pytest.raises(KilledError):
        run(killed, ours, passes(store, until=5))
    assert not killed.is_finished()
    assert [(first, end) for first, end, _ in killed.blocks()] == [(0, 2), (2, 4)]
    left = store.num_packs - 4
    run(killed, ours, passes(store, until=left))  # one pass more would be a pass too many
    assert np.array_equal(killed.load(REFERENCE), unbroken.load(REFERENCE))
    assert not list(killed.blocks())


def test_damaged_values_are_computed_again(
    store: PackStore, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    _, ours = models
    folder = PriorFolder.beside(tmp_path, {"case": 1})
    run(folder, ours, passes(store))
    before = folder.load(REFERENCE).copy()
    file = folder.folder / f"{REFERENCE}.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    assert not folder.is_finished()
    run(folder, ours, passes(store))
    assert folder.is_finished()
    assert np.array_equal(folder.load(REFERENCE), before)


def test_values_of_other_facts_are_not_shared(tmp_path: Path) -> None:
    facts = {"weights": 1, "precision": "fp32"}
    folders = {
        PriorFolder.beside(tmp_path, facts | change).folder for change in ({}, {"precision": "bf16"}, {"weights": 2})
    }
    assert len(folders) == 3
