from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_cases import Document, write_store

from packhorse.data.packs.packing import Packing
from packhorse.data.packs.store import open_store, write_split

DOCUMENTS: list[Document] = [
    ([5, 6, 7], [0, 1, 1]),
    ([8, 9], [1, 0]),
    ([10, 11, 12, 13], [1, 0, 1, 1]),
    ([14, 15], [1, 1]),
]
ONE_EACH = Packing(np.arange(4), np.arange(5))


@pytest.mark.parametrize("pieces", [1, 3, 11])
@pytest.mark.parametrize(("vocab_size", "width"), [(100, 2), (65535, 2), (65536, 4), (151_646, 4)])
def test_store_gives_back_what_was_written(tmp_path: Path, vocab_size: int, width: int, pieces: int) -> None:
    store = write_store(tmp_path, DOCUMENTS, vocab_size=vocab_size, pieces=pieces)
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


def test_the_highest_ids_survive(tmp_path: Path) -> None:
    store = write_store(tmp_path, [([65_535, 65_536, 151_645], [0, 1, 1])], vocab_size=151_646)
    assert store.document(0)[0].tolist() == [65_535, 65_536, 151_645]


def test_masks_may_be_bool_and_rows_may_come_in_blocks(tmp_path: Path) -> None:
    counts = write_split(
        tmp_path / "train",
        ids=[np.arange(11)],
        supervised=[np.array([mask == 1 for _, masks in DOCUMENTS for mask in masks])],
        lengths=np.array([3, 2, 4, 2]),
        labels=np.array([2, 0, 2, 1]),
        rows=[b'{"where": "a"}\n{"where": "b"}\n', b'{"where": "c"}\n'],
        vocab_size=100,
        length_tokens=4,
        packing=ONE_EACH,
    )
    assert np.fromfile(tmp_path / "train" / "supervised.bin", np.uint8).tolist() == [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1]
    assert (tmp_path / "train" / "rows.jsonl").read_text().splitlines()[2] == '{"where": "c"}'
    for name, record in counts.files.items():
        content = (tmp_path / "train" / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest()), name
    assert counts.files.keys() == {path.name for path in (tmp_path / "train").iterdir()}
    assert counts.model_dump(exclude={"files"}) == {
        "num_rows": 4,
        "num_tokens": 11,
        "num_supervised_tokens": 5,
        "num_packs": 4,
        "fill": 11 / 16,
    }


@pytest.mark.parametrize(("num_ids", "num_masks"), [(10, 11), (12, 11), (11, 10), (11, 12)])
def test_tokens_that_do_not_add_up_are_refused(tmp_path: Path, num_ids: int, num_masks: int) -> None:
    with pytest.raises(ValueError, match="11 tokens by length"):
        write_split(
            tmp_path / "train",
            ids=[np.zeros(num_ids, np.uint16)],
            supervised=[np.zeros(num_masks, np.uint8)],
            lengths=np.array([3, 2, 4, 2]),
            labels=np.zeros(4, np.int64),
            rows=None,
            vocab_size=100,
            length_tokens=6,
            packing=ONE_EACH,
        )


def test_missing_split_is_no_store(tmp_path: Path) -> None:
    write_store(tmp_path, DOCUMENTS)
    with pytest.raises(FileNotFoundError, match="no prepared split validation"):
        open_store(tmp_path, "validation")


def test_the_test_split_stays_sealed(tmp_path: Path) -> None:
    write_store(tmp_path, DOCUMENTS, split="test")
    with pytest.raises(ValueError, match="sealed"):
        open_store(tmp_path, "test")
    assert open_store(tmp_path, "test", unsealed=True).num_documents == 4


@pytest.mark.parametrize(
    ("packing", "split", "expected"),
    [
        ("in_order", "train", True),
        ("in_order", "validation", False),
        ("mixed", "train", False),
        ("none", "train", False),
    ],
)
def test_only_train_packs_are_kept_in_order(tmp_path: Path, packing: str, split: str, expected: bool) -> None:
    assert write_store(tmp_path, DOCUMENTS, packing=packing, split=split).in_order is expected


def test_documents_anywhere_in_the_file_can_be_fetched(tmp_path: Path) -> None:
    # 60,000 bytes of ids: places that begin within a page of the file, which madvise(2) refuses as they are.
    store = write_store(tmp_path, [(list(range(10)), [1] * 10)] * 3000, length=64)
    store.fetch(np.arange(store.num_packs))
    store.fetch(np.array([store.num_packs - 1]))
    store.fetch(np.zeros(0, np.int64))
    assert store.document(2999)[0].tolist() == list(range(10))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=40), st.sampled_from(["mixed", "best_fit", "in_order", "none"])
)
def test_no_pack_holds_more_than_its_length(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], how: str
) -> None:
    documents = [(list(range(length)), [1] * length) for length in lengths]
    store = write_store(tmp_path_factory.mktemp("data"), documents, length=12, packing=how)
    by_pack = [[lengths[document] for document in store.documents_of(pack)] for pack in range(store.num_packs)]
    assert all(0 < sum(pack) <= 12 for pack in by_pack)
    assert store.pack_tokens.tolist() == [sum(pack) for pack in by_pack]
