"""Cross-validation: each row is held out once, groups stay together, and the test rows stay sealed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from data_cases import MakeRecipe, chat, write_lines

from packhorse.data.content_key import content_key
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import PreparedData, prepare
from packhorse.errors import UserError

WORDS = ["hi", "there", "how", "are", "you", "fine", "bye", "x"]


def threads(prepared: PreparedData, split: str) -> list[tuple[int, int]]:
    rows = open_store(prepared.folder, split, unsealed=True).rows()
    return [(row["fields"]["thread"], row["fields"]["number"]) for row in rows]


def test_each_row_outside_test_is_held_out_once_and_no_thread_is_divided(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    words = [" ".join(WORDS[int(digit)] for digit in f"{value:04o}") for value in range(120)]
    rows = [
        chat("u:hi", f"a:{text}", thread=at // 4, number=at, kind="ab"[at % 8 // 4]) for at, text in enumerate(words)
    ]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    split = {"train": 0.6, "validation": 0.2, "test": 0.2, "group_by": "thread", "stratify": ["kind"]}
    plain = prepare(make_recipe(path, data={"split": split}))
    folds = [prepare(make_recipe(path, data={"split": {**split, "fold": [n, 3]}})) for n in (1, 2, 3)]
    held_out = [threads(prepared, "validation") for prepared in folds]
    together = [row for fold in held_out for row in fold]
    sealed = threads(plain, "test")
    # Every row is in one fold or in the test split of the recipe without folds, which the folds do not change.
    assert sorted(number for _, number in together + sealed) == list(range(120))
    assert [prepared.manifest.test_rows for prepared in folds] == [plain.manifest.test_rows] * 3
    assert all(set(Counter(thread for thread, _ in fold).values()) == {4} for fold in held_out)
    # 24 threads outside test: 8 per fold, half of each kind within one thread.
    assert [len(fold) for fold in held_out] == [32, 32, 32]
    assert all(abs(sum(thread % 2 for thread, _ in fold) / 4 - 4) <= 1 for fold in held_out)
    kept = folds[0].manifest.ledger.kept
    assert {side: entry.rows for side, entry in kept.items()} == {"train": 64, "validation": 32, "test": 24}


def test_folds_without_rows_are_refused_and_old_keys_stay(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *[chat("u:hi", f"a:{word}") for word in WORDS])
    split = {"train": 0.5, "validation": 0.5}
    with pytest.raises(UserError, match="8 rows outside test, in 8 groups, for 20 folds"):
        prepare(make_recipe(path, data={"split": {**split, "fold": [1, 20]}}))
    first, second = (content_key(make_recipe(path, data={"split": {**split, "fold": [n, 2]}})) for n in (1, 2))
    assert len({content_key(make_recipe(path, data={"split": split})), first, second}) == 3
