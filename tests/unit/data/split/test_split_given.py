"""Splits given as separate sources: leaks between them, sealed test rows, and what is still drawn from the sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_cases import MakeRecipe, chat, write_lines

from packhorse.data.checks.keys import normalised
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import PreparedData, prepare
from packhorse.data.seal import record_look
from packhorse.data.split.shares import resolve_shares
from packhorse.errors import UserError
from packhorse.recipe.schema import SplitSection

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
HELD_OUT = [
    chat("u:Where is my card?", "a:card arrival"),
    chat("u:Is there a top-up limit?", "a:limit"),
    chat("u:Who pays the fee?", "a:you"),
    chat(f"u:{LONG}", "a:fine"),
]
OTHERS = [chat(f"u:what is {number} - 1", f"a:{number - 1}") for number in range(8)]
LEAKING = [
    HELD_OUT[0],
    chat("s:Be brief.", "u:is there a  top up limit", "a:Limit."),
    chat("u:who pays the fee", "a:the bank"),
    chat(f"u:{LONG} eighteen", "a:fine"),
]
COUNTS = (
    "1 equal, 1 with the same prompt and answer, 1 with the same prompt and another answer, 1 nearly equal; the first: "
)


def kept(prepared: PreparedData) -> dict[str, int]:
    return {name: entry.rows for name, entry in prepared.manifest.ledger.kept.items()}


def given(tmp_path: Path, **lists: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys of `data` that name one file of rows each."""
    return {name: [{"path": str(write_lines(tmp_path / f"{name}.jsonl", *rows))}] for name, rows in lists.items()}


def answers(prepared: PreparedData, split: str) -> set[str]:
    return {row["messages"][-1]["content"] for row in open_store(prepared.folder, split, unsealed=True).rows()}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_each_kind_of_leak_is_refused_with_its_count(make_recipe: MakeRecipe, tmp_path: Path, split: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *LEAKING, *OTHERS)
    data = given(tmp_path, **{split: HELD_OUT})
    with pytest.raises(UserError) as caught:
        prepare(make_recipe(path, data=data))
    (mistake,) = caught.value.mistakes
    assert mistake.fact.startswith(f"4 rows of data.sources are also in data.{split}: {COUNTS}")
    shown = ", ".join(f"{path}:{line} ({tmp_path}/{split}.jsonl:{line})" for line in (1, 2, 3))
    assert mistake.fact.endswith(f"; the first: {shown}.")
    assert mistake.fix.startswith("set data.duplicates.leaks to drop")
    assert list((tmp_path / "runs").rglob("*.bin")) == []


def test_leaks_are_dropped_from_training_or_kept_and_counted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *LEAKING, *OTHERS)
    data = {**given(tmp_path, validation=HELD_OUT), "split": {}}
    dropped = prepare(make_recipe(path, data={**data, "duplicates": {"leaks": "drop"}}))
    assert (dropped.manifest.ledger.losses["leaked"].rows, kept(dropped)) == (4, {"train": 8, "validation": 4})
    assert answers(dropped, "validation") == {"card arrival", "limit", "you", "fine"}
    more = prepare(make_recipe(path, data={**data, "duplicates": {"leaks": "keep"}}))
    assert (more.manifest.findings["leaks"], kept(more)) == (4, {"train": 12, "validation": 4})
    (note,) = [note for note in more.manifest.notes if "also in" in note]
    assert COUNTS in note
    assert note.endswith("; they are kept, as data.duplicates.leaks says")


def test_near_copies_that_are_not_searched_for_are_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", LEAKING[3], *OTHERS)
    data = {**given(tmp_path, validation=HELD_OUT), "duplicates": {"near": "ignore"}}
    prepared = prepare(make_recipe(path, data=data))
    assert prepared.manifest.findings["leaks"] == 0
    assert any("near copies in given splits are not searched for" in note for note in prepared.manifest.notes)


def test_between_validation_and_test_the_test_row_is_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *OTHERS)
    data = given(tmp_path, validation=HELD_OUT, test=[LEAKING[2], *HELD_OUT[:2]])
    with pytest.raises(UserError, match="3 rows of data.validation are also in data.test: 2 equal, 1 with the same"):
        prepare(make_recipe(path, data=data))
    prepared = prepare(make_recipe(path, data={**data, "duplicates": {"leaks": "drop"}}))
    assert kept(prepared) == {"train": 8, "validation": 1, "test": 3}
    assert answers(prepared, "validation") == {"fine"}


def test_one_conversation_in_two_given_splits_is_a_leak(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *({**row, "thread": at} for at, row in enumerate(OTHERS)))
    data = given(tmp_path, validation=[{**HELD_OUT[0], "thread": 3}])
    with pytest.raises(UserError, match="1 row of data.sources is also in data.validation: 1 with the same value of"):
        prepare(make_recipe(path, data={**data, "split": {"group_by": "thread"}}))


def test_one_instruction_with_many_answers_is_no_leak(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    stories = [chat("u:Tell a story.", f"a:story {number} ends") for number in range(25)]
    path = write_lines(tmp_path / "rows.jsonl", *stories[:20])
    prepared = prepare(make_recipe(path, data={**given(tmp_path, validation=stories[20:]), "split": {}}))
    assert kept(prepared) == {"train": 20, "validation": 5}
    # The same answer makes it a copy, whatever the case.
    more = given(tmp_path, validation=[*stories[20:], chat("u:tell a story", "a:Story 3 ends!")])
    with pytest.raises(UserError, match="1 row of data.sources is also in data.validation: 1 with the same prompt and"):
        prepare(make_recipe(path, data=more))


def test_sources_without_a_row_of_their_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *HELD_OUT)
    data = {**given(tmp_path, validation=HELD_OUT), "duplicates": {"leaks": "drop"}}
    with pytest.raises(UserError, match="no row of data.sources is left: 4 of 4 are dropped as leaked"):
        prepare(make_recipe(path, data=data))


def test_given_test_rows_are_sealed_and_their_looks_counted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *OTHERS, *OTHERS[:2])
    data = {**given(tmp_path, validation=HELD_OUT[:1], test=HELD_OUT[1:]), "split": {}}
    one, two = (prepare(make_recipe(path, data=data, batch={"length": length})) for length in (32, 64))
    assert kept(one) == {"train": 10, "validation": 1, "test": 3}
    assert one.manifest.shares_reason.startswith("data.validation and data.test are given")
    with pytest.raises(ValueError, match="sealed"):
        open_store(one.folder, "test")
    record_look(one.folder, "first", "2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match="opened once: first"):
        record_look(two.folder, "second", "2026-01-02T00:00:00+00:00")


@pytest.mark.parametrize(
    ("split", "splits", "shares"),
    [
        pytest.param({}, ["validation"], (1, 0, 0), id="no test share is drawn unless it is asked for"),
        pytest.param({"test": 0.2}, ["validation"], (0.8, 0, 0.2), id="validation given, test drawn"),
        pytest.param({"train": 0.7, "validation": 0.3}, ["validation"], (1, 0, 0), id="shares of a given split"),
        pytest.param({"test": 0.2}, ["validation", "test"], (1, 0, 0), id="nothing is drawn"),
        pytest.param({}, ["test"], (0.85, 0.15, 0), id="test given, validation by the number of rows"),
        pytest.param({"train": 0.8, "validation": 0.2}, ["test"], (0.8, 0.2, 0), id="test given, both others too"),
        pytest.param({"train": 0.9}, ["test"], (0.9, 0.1, 0), id="the rest is validation"),
        pytest.param({"validation": 0.1}, ["test"], (0.9, 0.1, 0), id="the rest is train"),
        pytest.param({"train": 0.7, "validation": 0.2, "test": 0.1}, ["test"], (0.8, 0.2, 0), id="its share is train"),
    ],
)
def test_shares_beside_given_splits(split: dict[str, float], splits: list[str], shares: tuple[float, ...]) -> None:
    assert resolve_shares(SplitSection(**split), 100, splits)[0] == pytest.approx(shares)


def test_a_test_share_is_drawn_beside_given_validation_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *OTHERS)
    prepared = prepare(make_recipe(path, data={**given(tmp_path, validation=HELD_OUT), "split": {"test": 0.25}}))
    assert kept(prepared) == {"train": 6, "validation": 4, "test": 2}


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("Is there a top-up limit?", "is there a top up  limit", True),
        ("Who pays, and when...", "who pays and when", True),
        ("¿Cuánto cuesta?", "Cuánto cuesta", True),
        ("\N{LEFT DOUBLE QUOTATION MARK}Hi\N{RIGHT DOUBLE QUOTATION MARK} there", '"hi" there', True),
        ("e\N{COMBINING ACUTE ACCENT}t\N{LATIN SMALL LETTER E WITH ACUTE}", "été", True),
        ("what is 3 - 2", "what is 3 + 2", False),
        ("what is .5", "what is 5", False),
        ("what is 1,000", "what is 1 000", False),
        ("what is x*y", "what is x y", False),
    ],
)
def test_what_normalised_text_keeps(one: str, other: str, is_same: bool) -> None:
    assert (normalised(one) == normalised(other)) is is_same
