"""Held-out preference pairs: which answer a model prefers, and that only chosen answers count as its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packhorse.data.packs.store import open_store
from packhorse.evaluate.preference import documents_and_rejected, preferences
from packhorse.evaluate.score import Loss
from prepared import write_prepared


def test_chosen_answers_are_the_documents_and_rejected_ones_stand_beside(tmp_path: Path) -> None:
    rows: Any = [([1, 5, number], [0, 1, 1], {}) for number in range(10, 16)]
    store = open_store(write_prepared(tmp_path, {"validation": rows}, documents_per_row=2), "validation")
    chosen, rejected = documents_and_rejected(store)
    assert rejected is not None
    assert [int(chosen.document(row)[0][-1]) for row in range(chosen.num_documents)] == [10, 12, 14]
    assert [int(rejected.document(row)[0][-1]) for row in range(rejected.num_documents)] == [11, 13, 15]


def test_the_preferred_answer_is_the_more_probable_one_and_its_test_is_mcnemars() -> None:
    num_rows = 40
    nats = np.linspace(10, 20, num_rows)
    # The base prefers the chosen answer in 10 of 40 rows, the tuned model in all: 30 rows differ, in one direction.
    base = [[Loss(each, 5) for each in nats], [Loss(each + (1 if at < 10 else -1), 9) for at, each in enumerate(nats)]]
    tuned = [[Loss(each, 5) for each in nats], [Loss(each + 2, 2) for each in nats]]
    values = preferences((base[0], tuned[0]), (base[1], tuned[1]))
    assert (values.base.mean(), values.tuned.mean()) == (0.25, 1.0)
    tested = values.tested(list(range(num_rows)), np.ones(num_rows, bool))
    assert tested.p == pytest.approx(2 * 0.5**30)
