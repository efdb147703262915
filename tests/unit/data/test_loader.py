from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packhorse.data.ledger import Ledger
from packhorse.data.manifest import DataManifest, write_manifest
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader, make_micro_batch
from packhorse.data.packs.store import PackStore, SplitWriter, open_store

DOCUMENTS = [([5, 6, 7], [0, 1, 1]), ([8, 9], [1, 0]), ([10, 11, 12, 13], [1, 0, 1, 1]), ([14, 15], [1, 1])]


def write_store(folder: Path, vocab_size: int = 100, length: int = 6) -> PackStore:
    with SplitWriter(folder / "train", vocab_size, keep_rows=True) as writer:
        for number, (ids, mask) in enumerate(DOCUMENTS):
            writer.append(ids, np.array(mask, np.uint8), {"where": f"rows.jsonl:{number}"})
        counts = writer.finish(length)
    manifest = DataManifest(
        content_hash="0" * 16,
        tokenizer="/tokenizer",
        vocab_size=vocab_size,
        template="tokenizer",
        stop_token="<end>",
        length_tokens=length,
        sources=(),
        splits={"train": counts},
        fields=(),
        ledger=Ledger(rows_in=4, train=4),
    )
    write_manifest(manifest, folder)
    return open_store(folder, "train")


@pytest.mark.parametrize(("vocab_size", "width"), [(100, 2), (65535, 2), (65536, 4), (151_646, 4)])
def test_store_gives_back_what_was_written(tmp_path: Path, vocab_size: int, width: int) -> None:
    store = write_store(tmp_path, vocab_size)
    assert (tmp_path / "train" / "tokens.bin").stat().st_size == 11 * width
    for number, (ids, mask) in enumerate(DOCUMENTS):
        found_ids, found_mask = store.document(number)
        assert (found_ids.tolist(), found_mask.tolist()) == (ids, mask)
    assert [row["where"] for row in store.rows()] == [f"rows.jsonl:{number}" for number in range(4)]
    # Lengths 3 2 4 2 into two packs of 6: 4 beside one 2, 3 beside the other.
    packs = [store.documents_of(pack).tolist() for pack in range(store.num_packs)]
    assert sorted(document for pack in packs for document in pack) == [0, 1, 2, 3]
    assert len(packs) == 2
    lengths, labels = [3, 2, 4, 2], [2, 0, 2, 1]
    assert store.pack_tokens.tolist() == [sum(lengths[d] for d in pack) for pack in packs]
    assert store.pack_costs.tolist() == [sum(lengths[d] ** 2 for d in pack) for pack in packs]
    assert store.pack_labels.tolist() == [sum(labels[d] for d in pack) for pack in packs]


def test_missing_split_is_no_store(tmp_path: Path) -> None:
    write_store(tmp_path)
    with pytest.raises(FileNotFoundError, match="no prepared split validation"):
        open_store(tmp_path, "validation")


def test_micro_batch_by_hand(tmp_path: Path) -> None:
    micro_batch = make_micro_batch(write_store(tmp_path), np.array([0, 1]))
    assert micro_batch.input_ids.tolist() == [[14, 15, 10, 11, 12, 13, 8, 9, 5, 6, 7]]
    assert micro_batch.labels.tolist() == [[15, -100, -100, 12, 13, -100, -100, -100, 6, 7, -100]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert micro_batch.cu_seq_lens.tolist() == [0, 2, 6, 8, 11]
    assert str(micro_batch.cu_seq_lens.dtype) == "torch.int32"
    assert {str(each.dtype) for each in (micro_batch.input_ids, micro_batch.labels, micro_batch.position_ids)} == {
        "torch.int64"
    }
    assert (micro_batch.max_length, micro_batch.document_lengths, micro_batch.num_tokens) == (4, (2, 4, 2, 3), 11)


def test_no_pack_is_two_tokens_that_train_nothing(tmp_path: Path) -> None:
    micro_batch = make_micro_batch(write_store(tmp_path), np.array([], np.int64))
    assert micro_batch.input_ids.tolist() == [[0, 0]]
    assert micro_batch.labels.tolist() == [[-100, -100]]
    assert micro_batch.cu_seq_lens.tolist() == [0, 2]


def loaders(store: PackStore, world: int, accumulation: int, **rest: Any) -> list[PackLoader]:
    plan = BatchPlan(store.pack_costs, packs_per_step=4, seed=0)
    return [PackLoader(store, plan, rank, world, accumulation, False, **rest) for rank in range(world)]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_totals_of_the_step_are_those_of_all_ranks(tmp_path: Path, world: int, accumulation: int) -> None:
    ranks = loaders(write_store(tmp_path), world, accumulation)
    batches = [rank.step(3) for rank in ranks]
    assert {(batch.num_supervised_tokens, batch.num_tokens, batch.num_slots) for batch in batches} == {(5, 11, 12)}
    micro_batches = [micro_batch for batch in batches for micro_batch in batch.micro_batches]
    assert len(micro_batches) == world * accumulation
    assert sum(int((micro_batch.labels != -100).sum()) for micro_batch in micro_batches) == 5
    real = [micro_batch for micro_batch in micro_batches if micro_batch.input_ids.any()]
    assert sum(micro_batch.num_tokens for micro_batch in real) == 11
    for rank in ranks:
        rank.close()


def test_any_step_in_any_order_gives_the_same(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    plan = BatchPlan(store.pack_costs, packs_per_step=1, seed=0)
    loader = PackLoader(store, plan, 0, 1, 1, False)
    in_order = [loader.step(k).micro_batches[0].input_ids.tolist() for k in range(6)]
    out_of_order = {k: loader.step(k).micro_batches[0].input_ids.tolist() for k in (5, 0, 3, 4, 2, 1)}
    assert in_order == [out_of_order[k] for k in range(6)]
    loader.close()


def test_a_ledger_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="5 rows came in and 4 are accounted for"):
        Ledger(rows_in=5, train=3, over_long_dropped=1)
