"""Prepared data made by hand: documents of ids and masks, written as `packhorse prepare` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packhorse.data.data_manifest import DataManifest, write_data_manifest
from packhorse.data.ledger import Entry, Ledger
from packhorse.data.packs.packing import pack
from packhorse.data.packs.store import PackStore, open_store, write_split

Document = tuple[Sequence[int], Sequence[int]]
"""Ids, and a mask of 0 and 1."""


def write_store(
    folder: Path,
    documents: Sequence[Document],
    *,
    vocab_size: int = 100,
    length: int = 6,
    packing: str = "mixed",
    split: str = "train",
    pieces: int = 1,
) -> PackStore:
    """Writes one split, ids and masks in so many pieces, and opens it."""
    ids = np.concatenate([np.array(ids, np.uint32) for ids, _ in documents])
    masks = np.concatenate([np.array(mask, np.uint8) for _, mask in documents])
    lengths = np.array([len(ids) for ids, _ in documents])
    counts = write_split(
        folder / split,
        ids=np.array_split(ids, pieces),
        supervised=np.array_split(masks, pieces),
        lengths=lengths,
        labels=np.array([sum(mask[1:]) for _, mask in documents]),
        rows=(json.dumps({"where": f"rows.jsonl:{number}"}).encode() + b"\n" for number in range(len(documents))),
        vocab_size=vocab_size,
        length_tokens=length,
        packing=pack(lengths, length, packing, 0),
    )
    every = Entry(rows=len(documents), tokens=counts.num_tokens)
    more: dict[str, Any] = {"settings": {}, "shares": (1, 0, 0), "shares_reason": "", "fields": (), "sources": ()}
    manifest = DataManifest(
        version="0",
        content_hash="0" * 16,
        tokenizer="/tokenizer",
        vocab_size=vocab_size,
        template="tokenizer",
        stop_token="<end>",
        length_tokens=length,
        packing=packing,
        splits={split: counts},
        ledger=Ledger(rows_in=every, losses={}, kept={split: every}),
        **more,
    )
    write_data_manifest(manifest, folder)
    return open_store(folder, split, unsealed=True)
