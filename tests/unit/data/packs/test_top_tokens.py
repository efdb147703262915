"""A teacher's stored tokens: what was written comes back by pack, and damage is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.store import PackStore, open_store
from packhorse.data.packs.top_tokens import BLOCK_PACKS, TopTokens, num_bytes_of, top_tokens_of
from prepared import write_prepared

TOP = 3
FACTS = {"teacher": "t", "top": TOP}


@pytest.fixture
def store(tmp_path: Path) -> PackStore:
    """More packs than a block has; documents of 60 tokens, one per pack, of which 1 to 40 are supervised."""
    documents = [
        ([number % 500, *range(59)], [0] * (59 - number % 40) + [1] * (1 + number % 40), {})
        for number in range(BLOCK_PACKS + 4)
    ]
    return open_store(write_prepared(tmp_path / "data", {"train": documents}), "train")


def written(store: PackStore, vocab_size: int = 512) -> TopTokens:
    """Each supervised token, numbered over the packs, has ids n, n + 1, n + 2 and log-probabilities -n/64 - 0, 1, 2."""
    tokens = top_tokens_of(store, FACTS, vocab_size)
    first = 0
    for block in range(tokens.num_blocks):
        packs = tokens.packs_of(block)
        count = int(store.pack_labels[packs.start : packs.stop].sum())
        numbers = np.arange(first, first + count)[:, None]
        tokens.write(block, numbers + np.arange(TOP), -numbers / 64 - np.arange(TOP))
        first += count
    return tokens


def test_each_pack_has_its_own_tokens(store: PackStore) -> None:
    written(store)
    tokens = top_tokens_of(store, FACTS, 512)
    starts = np.concatenate([[0], np.cumsum(store.pack_labels)])
    for packs in ([0], [BLOCK_PACKS], [BLOCK_PACKS + 3, 2], []):
        ids, log_probabilities = tokens.read(np.array(packs, np.int64))
        numbers = [number for pack in packs for number in range(starts[pack], starts[pack + 1])]
        assert ids[:, 0].tolist() == numbers
        assert log_probabilities.astype(float) == pytest.approx(
            -np.array(numbers).reshape(-1, 1) / 64 - np.arange(TOP), rel=1e-3
        )
        assert (ids.dtype, log_probabilities.dtype) == (np.int64, np.float16)


def test_wide_vocabularies_keep_their_ids(store: PackStore) -> None:
    tokens = top_tokens_of(store, {"top": 1}, 151_936)
    count = int(store.pack_labels[:BLOCK_PACKS].sum())
    tokens.write(0, np.full((count, 1), 151_935), np.zeros((count, 1)))
    assert (tokens.read(np.array([3]))[0] == 151_935).all()
    assert sum(f.stat().st_size for f in tokens.folder.glob("*.bin")) == num_bytes_of(count, 1, 151_936)


@pytest.mark.parametrize("damage", ["cut", "changed", "absent", "no_record", "torn_record"])
def test_a_damaged_block_is_found_and_others_are_kept(store: PackStore, damage: str) -> None:
    tokens = written(store)
    file = sorted(tokens.folder.glob("*.bin"))[1]
    content = bytearray(file.read_bytes())
    record = file.with_suffix(".json")
    match damage:
        case "cut":
            file.write_bytes(content[:-1])
        case "changed":
            content[5] ^= 1
            file.write_bytes(content)
        case "absent":
            file.unlink()
        case "no_record":
            record.unlink()
        case "torn_record":
            record.write_text(record.read_text(encoding="utf-8")[:20], encoding="utf-8")
    assert [tokens.is_intact(block) for block in range(tokens.num_blocks)] == [True, False]


def test_other_facts_have_other_tokens(store: PackStore) -> None:
    written(store)
    assert not top_tokens_of(store, {**FACTS, "teacher": "u"}, 512).is_intact(0)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_loader_gives_each_supervised_token_its_own(store: PackStore, num_parts: int) -> None:
    tokens = written(store)
    starts = np.concatenate([[0], np.cumsum(store.pack_labels)])
    batches = BatchPlan(store.pack_costs, 4, 0)
    found = []
    for part in range(num_parts):
        loader = PackLoader(replace(store, teacher=tokens), batches, 0, 1, 2, False, part, num_parts)
        found.append([each.teacher_ids for each in loader.step(0).micro_batches])
        loader.close()
    for number, packs in enumerate(batches.share(0, 1, 2)[0].tolist()):
        ids = torch.cat([parts[number] for parts in found])
        assert ids[:, 0].tolist() == [n for pack in packs for n in range(starts[pack], starts[pack + 1])]
