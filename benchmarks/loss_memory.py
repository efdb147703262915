"""Peak memory and time of the loss: our chunks beside plain logits and TRL's fused head, forward and backward.

    python benchmarks/loss_memory.py [--write]

2,048 tokens of width 256, every one supervised, fp32, one thread; each measurement in a fresh process, so that none finds
memory that another has left. Extra peak is the process's peak of resident memory less what it had before the loss: weight,
hidden states and a first use of torch are in both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import lab_log

WIDTH, NUM_TOKENS, REPEATS = 256, 2048, 3
VOCABULARIES = (128_256, 151_936)
CONTESTANTS = ("plain", "trl", "ours", "chunks of 256", "chunks of 1024")
TITLES = {
    "plain": "plain logits, cross-entropy",
    "trl": "TRL's fused head",
    "ours": "packhorse",
    "chunks of 256": "the same in chunks of 256",
    "chunks of 1024": "the same in chunks of 1,024",
}


def main() -> int:
    """Measures, prints the table, and writes it down where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    write = parser.parse_args().write
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    measured = [(vocabulary, _measure_all(vocabulary)) for vocabulary in VOCABULARIES]
    text = _describe(measured)
    sys.stdout.write(text + "\n")
    if write:
        lab_log.append("Memory of the loss", text)
    return 0


def _measure_all(vocabulary: int) -> dict[str, dict[str, float]]:
    return {name: _measure(name, vocabulary) for name in CONTESTANTS}


def _measure(name: str, vocabulary: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, vocabulary, there))
    child.start()
    there.close()
    figures: dict[str, float] = here.recv()
    child.join()
    return figures


def _child(name: str, vocabulary: int, pipe: Connection) -> None:
    # Only in the child: what one contestant imports must not weigh on another.
    import torch

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(vocabulary, WIDTH) * 0.02)
    hidden = torch.randn(1, NUM_TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(0, vocabulary, (NUM_TOKENS,))
    loss_of = _loss(name, weight, labels)
    torch.nn.functional.cross_entropy(torch.randn(8, WIDTH) @ torch.randn(WIDTH, 64), torch.zeros(8, dtype=torch.long))
    before = _peak_bytes()
    _reset_peak()
    resident = _resident_bytes()
    assert before >= resident
    seconds = []
    for _ in range(REPEATS):
        weight.grad = hidden.grad = None
        start = time.process_time()
        loss = loss_of(hidden)
        loss.backward()
        seconds.append(time.process_time() - start)
    pipe.send({"bytes": _peak_bytes() - resident, "seconds": median(seconds), "loss": loss.item() / NUM_TOKENS})


def _loss(name: str, weight: Any, labels: Any) -> Any:  # noqa: ANN401
    """Function from hidden states [1, N, H] to the sum of token losses."""
    import torch
    import torch.nn.functional as F

    if name == "plain":
        return lambda hidden: F.cross_entropy(F.linear(hidden[0], weight), labels, reduction="sum")
    if name == "trl":
        return _trl_loss(weight, labels)
    if name == "ours":
        from packhorse.train.objective import token_loss_sum

        return lambda hidden: token_loss_sum(hidden[0], weight, None, labels)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=int(name.rsplit(maxsplit=1)[1]))
    return lambda hidden: F.linear_cross_entropy(hidden[0], weight, labels, reduction="sum", options=options)
