"""Peak memory and time of the loss, forward and backward: our chunks beside plain logits and TRL's fused head.

    python benchmarks/loss_memory.py [--write]

4,096 tokens of width 256, all supervised, fp32, one thread. Each measurement has a process of its own, so that none
finds memory that another has left. Extra peak is how far the loss raises the process's peak of resident memory;
the gradients of weight and hidden states are in it for all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import lab_log
from packhorse.track.meter import resident_peak_bytes

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, NUM_TOKENS = 256, 4096
VOCABULARIES = (128_256, 151_936)
# What SFTTrainer asks of its fused head on every step.
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")


@dataclass(frozen=True)
class Measured:
    """One loss: what it adds to the peak, CPU seconds of forward and backward, nats per token."""

    extra_bytes: int
    seconds: float
    loss: float


def main() -> int:
    """Measures, prints the table, and writes it down where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="append the table to docs/lab-log.md")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; judges no bar")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    header = ("loss", "vocabulary", "extra peak", "CPU seconds", "nats per token")
    vocabularies, losses = (
        ((1_000,), ("plain logits, cross-entropy", "packhorse")) if options.smoke else (VOCABULARIES, LOSSES)
    )
    rows = [_row(name, vocabulary) for vocabulary in vocabularies for name in losses]
    text = f"{lab_log.machine(1, ('torch', 'trl'))}.\n\n{lab_log.markdown_table(header, rows)}"
    sys.stdout.write(text + "\n")
    if options.write:
        title = f"Memory of the loss, {NUM_TOKENS:,} tokens of width {WIDTH}, fp32, extra peak of the process"
        lab_log.append(title, text)
    return 0


def _row(name: str, vocabulary: int) -> list[str]:
    measured = _measure(name, vocabulary)
    megabytes = f"{measured.extra_bytes / 1e6:,.0f} MB"
    return [name, f"{vocabulary:,}", megabytes, f"{measured.seconds:.2f}", f"{measured.loss:.7f}"]


def _measure(name: str, vocabulary: int) -> Measured:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, vocabulary, there))
    child.start()
    there.close()
    measured: Measured = here.recv()
    child.join()
    return measured


def _child(name: str, vocabulary: int, pipe: Connection) -> None:
    # Imports only here: what one contestant loads must not weigh on another.
    import torch

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.empty(vocabulary, WIDTH).normal_(std=0.02))
    hidden = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(0, vocabulary, (NUM_TOKENS,))
    loss_of = LOSSES[name]()
    # A first use loads code, and with torch's chunks that is 72 MB of it.
    loss_of(*(torch.randn(8, WIDTH, requires_grad=True) for _ in range(2)), torch.arange(8)).backward()
    before, start = resident_peak_bytes(), time.process_time()
    loss = loss_of(hidden, weight, labels)
    loss.backward()
    seconds = time.process_time() - start
    pipe.send(Measured(resident_peak_bytes() - before, seconds, loss.item() / NUM_TOKENS))


LossOf = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(hidden [N, H], weight [V, H], labels [N]) to the sum of token losses."""


def _plain() -> LossOf:
    import torch.nn.functional as F

    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


def _trl() -> LossOf:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK
    from trl.trainer.utils import _ChunkedLogProbFunction as Head

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = Head.apply(hidden, weight, None, labels, 1.0, CHUNK, None, 1.0, TRL_OUTPUTS)[0]
        return -log_probabilities.sum()

    return loss_of


def _ours() -> LossOf:
    from packhorse.train.objectives.token_loss import token_loss_sum

    return lambda hidden, weight, labels: token_loss_sum(hidden, weight, None, labels)


def _chunks(num_tokens: int) -> Callable[[], LossOf]:
    def make() -> LossOf:
        import torch
        import torch.nn.functional as F

        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=num_tokens)
        return lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum", options=options
        )

    return make


LOSSES: dict[str, Callable[[], LossOf]] = {
    "plain logits, cross-entropy": _plain,
    "TRL's fused head": _trl,
    "torch's chunks of 1,024": _chunks(1024),
    "torch's chunks of 256": _chunks(256),
    "packhorse": _ours,
}

if __name__ == "__main__":
    sys.exit(main())
