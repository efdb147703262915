"""Measure a GGUF file on held-out rows: its loss, and how far it agrees with the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from packhorse.export.gguf.convert import Source
from packhorse.export.gguf.llama_cpp import LlamaCpp
from packhorse.export.reference import WHOLE_MODEL_BYTES, HeldOutRow, load_layers, log_probabilities

TOP: Final = 256
"""Likeliest tokens that are compared one by one."""
MAX_TOKENS: Final = 512
"""Most supervised tokens that are measured; each asks llama.cpp once."""


@dataclass(frozen=True)
class Reference:
    """The model that a file is made from, on the measured rows.

    Attributes:
        rows: Rows, cut to `MAX_TOKENS` supervised tokens in all.
        top_ids: Likeliest tokens of each measured position, int64 [positions, k].
        top_values: Their log-probabilities, float32 [positions, k].
        target_values: Log-probability of the row's own token, float64 [positions].
    """

    rows: tuple[HeldOutRow, ...]
    top_ids: NDArray[np.int64]
    top_values: NDArray[np.float32]
    target_values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Quality:
    """A file on the measured rows.

    Attributes:
        kl: Mean Kullback-Leibler divergence from the reference, nats; tokens beyond its likeliest are one bucket.
        top_1: Share of positions where both have the same likeliest token.
        losses: Loss of each row, nats a supervised token, float64 [rows].
        reference_losses: The same of the reference.
        num_tokens: Supervised tokens of each row, int64 [rows].
    """

    kl: float
    top_1: float
    losses: NDArray[np.float64]
    reference_losses: NDArray[np.float64]
    num_tokens: NDArray[np.int64]


def reference_of(source: Source, rows: Sequence[HeldOutRow]) -> Reference:
    """Measure the model in fp32, or a large one in the type of its weights."""
    dtype = torch.float32 if source.fp32_bytes <= WHOLE_MODEL_BYTES else "auto"
    model = load_layers(source.folder, source.config, source.config.num_hidden_layers, dtype)
    kept = list(_within(rows, MAX_TOKENS))
    ids, values, targets = [], [], []
    for row in kept:
        here = log_probabilities(model, row.ids)[[position - 1 for position in row.positions]]
        top = here.topk(min(TOP, here.shape[-1]))
        ids.append(top.indices.numpy())
        values.append(top.values.numpy())
        targets.append(np.array([float(line[row.ids[at]]) for line, at in zip(here, row.positions)]))
    return Reference(tuple(kept), np.concatenate(ids), np.concatenate(values), np.concatenate(targets))


def quality_of(file: Path, reference: Reference, threads: int = 1) -> Quality:
    """Measure a file."""
    divergences, agreed, targets = [], [], []
    index = 0
    context = max(len(row.ids) for row in reference.rows) + 1
    with LlamaCpp(file, context, threads=threads) as llama:
        for row in reference.rows:
            for position in row.positions:
                found = llama.next_log_probabilities(row.ids[:position], reference.top_ids.shape[1])
                divergences.append(_divergence(reference.top_ids[index], reference.top_values[index], found))
                agreed.append(max(found, key=found.__getitem__) == reference.top_ids[index, 0])
                targets.append(found.get(row.ids[position], min(found.values())))
                index += 1
    of_row = np.repeat(np.arange(len(reference.rows)), [len(row.positions) for row in reference.rows])
    counts = np.bincount(of_row)
    return Quality(
        kl=float(np.mean(divergences)),
        top_1=float(np.mean(agreed)),
        losses=-np.bincount(of_row, np.array(targets)) / counts,
        reference_losses=-np.bincount(of_row, reference.target_values) / counts,
        num_tokens=counts,
    )


def _within(rows: Sequence[HeldOutRow], budget: int) -> Iterator[HeldOutRow]:
    for row in rows:
        if row.positions and budget > 0:
            yield HeldOutRow(row.ids, row.positions[:budget])
            budget -= len(row.positions)


def _divergence(ids: NDArray[np.int64], values: NDArray[np.float32], found: dict[int, float]) -> float:
    """Return KL(reference, file) over the reference's likeliest tokens and one bucket for the rest."""
    least = min(found.values())
    other = np.array([found.get(int(token), least) for token in ids], np.float64)
    mine = values.astype(np.float64)
    rest, other_rest = max(1 - np.exp(mine).sum(), 0.0), max(1 - np.exp(other).sum(), 1e-12)
    bucket = rest * math.log(rest / other_rest) if rest > 1e-12 else 0.0
    return float((np.exp(mine) * (mine - other)).sum() + bucket)
