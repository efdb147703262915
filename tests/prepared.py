"""A prepared data folder as `packhorse prepare` writes it, from ids and masks given by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packhorse.data.data_manifest import DataManifest, write_data_manifest
from packhorse.data.ledger import Entry, Ledger
from packhorse.data.packs.packing import pack
from packhorse.data.packs.store import write_split

LENGTH_TOKENS = 64
Document = tuple[Sequence[int], Sequence[int], dict[str, Any]]
"""Token ids, mask of 0 and 1, the row."""


def write_prepared(
    folder: Path,
    splits: dict[str, list[Document]],
    vocab_size: int = 512,
    length_tokens: int = LENGTH_TOKENS,
    **more: Any,
) -> Path:
    """Writes each split's files and data.json; rows are kept, as for validation, retain and test."""
    counts, kept = {}, {}
    for name, documents in splits.items():
        lengths = np.array([len(ids) for ids, _, _ in documents])
        counts[name] = write_split(
            folder / name,
            ids=[np.array(ids) for ids, _, _ in documents],
            supervised=[np.array(mask, np.uint8) for _, mask, _ in documents],
            lengths=lengths,
            labels=np.array([sum(mask[1:]) for _, mask, _ in documents]),
            rows=[json.dumps(row).encode() + b"\n" for _, _, row in documents],
            vocab_size=vocab_size,
            length_tokens=length_tokens,
            packing=pack(lengths, length_tokens, "best_fit", 0),
        )
        kept[name] = Entry(rows=len(documents), tokens=counts[name].num_tokens)
    every = Entry(rows=sum(e.rows for e in kept.values()), tokens=sum(e.tokens for e in kept.values()))
    fields = {
        "version": "0",
        "content_hash": "0" * 16,
        "tokenizer": "tokenizer",
        "vocab_size": vocab_size,
        "template": "tokenizer",
        "stop_token": "<|im_end|>",
        "length_tokens": length_tokens,
        "settings": {},
        "shares": (0.7, 0.15, 0.15),
        "shares_reason": "by hand",
        "sources": (),
        "splits": counts,
        "fields": (),
        "ledger": Ledger(rows_in=every, losses={}, kept=kept),
    }
    write_data_manifest(DataManifest(**{**fields, **more}), folder)
    return folder
