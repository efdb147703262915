"""Losses against a loop written by hand, one row and one token at a time."""

import math

import numpy as np
import pytest
import torch

from packhorse.evaluate import score
from packhorse.evaluate.score import Loss, document_losses, total_loss


class Rows:
    def __init__(self, rows):
        self.rows = rows
        self.num_documents = len(rows)

    def document(self, index):
        return self.rows[index]


def random_rows(lengths, vocabulary):
    random = np.random.default_rng(5)
    return [(random.integers(0, vocabulary, n).astype(np.uint16), random.integers(0, 2, n, np.uint8)) for n in lengths]


def by_hand(model, ids, supervised):
    with torch.no_grad():
        logits = model(torch.tensor([ids.tolist()])).logits[0].double()
    nats = 0.0
    for place in range(1, len(ids)):
        if supervised[place]:
            nats -= torch.log_softmax(logits[place - 1], -1)[int(ids[place])].item()
    return nats


@pytest.mark.parametrize("budget_bytes", [1, 2**14, 2**29], ids=["alone", "small", "together"])
def test_losses_equal_a_loop_by_hand(tiny, monkeypatch, budget_bytes):
    monkeypatch.setattr(score, "LOGITS_BYTES", budget_bytes)
    rows = random_rows((5, 31, 2, 17, 1, 31, 8), tiny.config.vocab_size)
    losses = document_losses(tiny, Rows(rows))
    assert [loss.sum_nats for loss in losses] == pytest.approx([by_hand(tiny, *row) for row in rows], abs=1e-4)
    assert [loss.num_supervised_tokens for loss in losses] == [int(mask[1:].sum()) for _, mask in rows]
    total = sum(by_hand(tiny, *row) for row in rows) / sum(int(mask[1:].sum()) for _, mask in rows)
    assert total_loss(losses).nats_per_token == pytest.approx(total, abs=1e-5)


def test_each_token_weighs_the_same_whatever_its_row():
    assert total_loss([Loss(10.0, 1), Loss(2.0, 3)]).nats_per_token == 3.0


def test_nothing_supervised_has_no_loss():
    assert math.isnan(total_loss([]).nats_per_token)
