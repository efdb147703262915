"""What becomes of rows: copies, bad rows, draws, groups, contamination, lengths. Expectations are counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import MakeRecipe, chat, write_lines

from packhorse.data.audit import audit
from packhorse.data.decide import joined
from packhorse.data.ledger import Entry, Ledger
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import PreparedData, prepare
from packhorse.data.seal import looks_at, record_look
from packhorse.errors import UserError
from packhorse.report.findings import findings

WORDS = ["hi", "there", "how", "are", "you", "fine", "bye", "x"]
ALL_TRAINED = {"split": {"train": 1.0, "validation": 0.0, "test": 0.0}}


def number(value: int) -> str:
    """A number in words, base 8, four of them."""
    return " ".join(WORDS[int(digit)] for digit in f"{value:04o}")


def rows(count: int, first: int = 0, **fields: Any) -> list[dict[str, Any]]:
    return [chat("u:hi", f"a:{number(value)}", **fields) for value in range(first, first + count)]


def losses(prepared: PreparedData) -> dict[str, int]:
    return {name: entry.rows for name, entry in prepared.manifest.ledger.losses.items()}


def kept(prepared: PreparedData) -> dict[str, int]:
    return {name: entry.rows for name, entry in prepared.manifest.ledger.kept.items()}


def dropped(prepared: PreparedData) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.folder / "dropped.jsonl").read_text().splitlines()]


def held_out(prepared: PreparedData, split: str) -> list[str]:
    return [row["messages"][-1]["content"] for row in open_store(prepared.folder, split, unsealed=True).rows()]


def documents(prepared: PreparedData) -> list[list[int]]:
    store = open_store(prepared.folder, "train")
    return [store.document(index)[0].tolist() for index in range(store.num_documents)]


def refusal(recipe: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    return str(caught.value)


def test_copies_are_counted_and_share_a_side(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *(rows(40) * 3))
    data = {"split": {"train": 0.5, "validation": 0.5, "test": 0.0}}
    prepared = prepare(make_recipe(path, data=data))
    assert prepared.manifest.findings["exact_duplicates"] == 80
    assert losses(prepared) == {}
    assert kept(prepared) == {"train": 60, "validation": 60}
    assert set(Counter(held_out(prepared, "validation")).values()) == {3}


def test_dropped_copies_are_listed_and_the_order_of_the_file_changes_nothing(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    some = rows(40)
    path = write_lines(tmp_path / "rows.jsonl", *some, *some[:10])
    other = write_lines(tmp_path / "other.jsonl", *reversed([*some, *some[:10]]))
    data = {"duplicates": {"exact": "drop"}}
    one, two = prepare(make_recipe(path, data=data)), prepare(make_recipe(other, data=data))
    assert losses(one) == {"duplicate": 10}
    assert dropped(one) == [{"where": f"{path}:{line}", "reason": "duplicate"} for line in range(41, 51)]
    assert sorted(held_out(one, "validation")) == sorted(held_out(two, "validation"))
    assert one.manifest.sources[0].losses == {"duplicate": 10}


LONG = "hi there how are you fine bye x hi how you bye there are fine x x hi bye you"


def test_near_copies_share_a_side_or_are_dropped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    words = LONG.split()
    # Each text comes twice, the second with one more word at its end: 18 of 19 shingles in common.
    texts = [" ".join(words[at:] + words[:at]) for at in range(12)]
    both = [chat("u:hi", f"a:{text}{end}") for text in texts for end in ("", " hi")]
    path = write_lines(tmp_path / "rows.jsonl", *both)
    split = {"train": 0.5, "validation": 0.5, "test": 0.0}
    prepared = prepare(make_recipe(path, data={"split": split, "duplicates": {"threshold": 0.85}}))
    assert prepared.manifest.findings["near_duplicates"] >= 12
    for text in held_out(prepared, "validation"):
        assert {text.removesuffix(" hi"), text.removesuffix(" hi") + " hi"} <= set(held_out(prepared, "validation"))
    fewer = prepare(make_recipe(path, data={"split": split, "duplicates": {"threshold": 0.85, "near": "drop"}}))
    assert losses(fewer) == {"duplicate": prepared.manifest.findings["near_duplicates"]}


def test_bad_rows_are_dropped_up_to_the_cap_and_listed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(50), "{broken", chat("u:hi"), *rows(48, 50))
    data = {"on_bad_row": "drop", "most_bad_rows": 0.02}
    prepared = prepare(make_recipe(path, data=data))
    assert losses(prepared) == {"bad": 2}
    assert sum(kept(prepared).values()) == 98
    assert [(row["where"], row["reason"]) for row in dropped(prepared)] == [
        (f"{path}:51", "bad"),
        (f"{path}:52", "bad"),
    ]
    assert "{broken" in dropped(prepared)[0]["fact"]
    message = refusal(make_recipe(path, data={"on_bad_row": "drop"}))
    assert "has 2 bad rows of 100, 2.0%; data.most_bad_rows is 1.0%." in message
    assert "set data.most_bad_rows to 0.02." in message
    assert f"{path}:51: the line is not JSON" in message


def test_file_of_nothing_but_bad_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", chat("u:hi"), chat("u:there"))
    assert "has no assistant turn" in refusal(make_recipe(path, data={"on_bad_row": "drop", "most_bad_rows": 1.0}))


def test_rows_are_drawn_by_number_and_by_weight(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", *rows(60, of="one"))
    two = write_lines(tmp_path / "two.jsonl", *rows(40, 100, of="two"))
    by_number = prepare(make_recipe({"path": str(one), "rows": 30}, str(two), data=ALL_TRAINED))
    assert (losses(by_number), kept(by_number)) == ({"not_drawn": 30}, {"train": 70})
    sources = ({"path": str(one), "weight": 1}, {"path": str(two), "weight": 3})
    by_weight = prepare(make_recipe(*sources, data=ALL_TRAINED))
    # All 40 of the second, and a third as many of the first.
    assert [source.losses for source in by_weight.manifest.sources] == [{"not_drawn": 47}, {}]
    assert "rows is 61 for" in refusal(make_recipe({"path": str(one), "rows": 61}))


def test_conversations_stay_on_one_side(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    some = [chat("u:hi", f"a:{number(value)}", thread=value // 4) for value in range(80)]
    path = write_lines(tmp_path / "rows.jsonl", *some)
    data = {"split": {"train": 0.5, "validation": 0.5, "test": 0.0, "group_by": "thread"}}
    prepared = prepare(make_recipe(path, data=data))
    threads = Counter(row["fields"]["thread"] for row in open_store(prepared.folder, "validation").rows())
    assert set(threads.values()) == {4}
    assert kept(prepared) == {"train": 40, "validation": 40}


def test_contaminated_rows_are_counted_or_dropped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    asked = "x hi how you bye there are fine x hi bye you there"
    path = write_lines(tmp_path / "rows.jsonl", *rows(40), chat(f"u:hi {asked} you", "a:fine"))
    evaluation = write_lines(tmp_path / "evaluation.jsonl", {"prompt": asked, "completion": "fine"})
    against = {"against": [{"path": str(evaluation)}]}
    told = prepare(make_recipe(path, data={"decontaminate": against}))
    assert (told.manifest.findings["contaminated"], losses(told)) == (1, {})
    less = prepare(make_recipe(path, data={"decontaminate": {**against, "action": "drop"}}))
    assert losses(less) == {"contaminated": 1}
    assert dropped(less) == [{"where": f"{path}:41", "reason": "contaminated"}]


def test_rows_of_validation_among_those_of_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(40))
    other = write_lines(tmp_path / "held-out.jsonl", *rows(10, 35))
    validation = {"validation": [{"path": str(other)}]}
    message = refusal(make_recipe(path, data=validation))
    assert f"5 rows of data.sources are also in data.validation: 5 equal; the first: {path}:36 ({other}:1)" in message
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    prepared = prepare(make_recipe(path, data={**validation, "split": split, "duplicates": {"leaks": "drop"}}))
    assert (losses(prepared), kept(prepared)) == ({"leaked": 5}, {"train": 35, "validation": 10})


def test_long_text_is_parted_without_losing_a_token(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # 25 words and the stop token, in parts of at most 10.
    path = write_lines(tmp_path / "rows.jsonl", {"text": "hi " * 25}, {"text": "bye"})
    prepared = prepare(make_recipe(path, data={**ALL_TRAINED, "over_long": "split"}, batch={"length": 10}))
    hi, bye, stop = WORDS.index("hi") + 6, WORDS.index("bye") + 6, 4
    assert documents(prepared) == [[hi] * 9, [hi] * 9, [hi] * 7 + [stop], [bye, stop]]
    ledger = prepared.manifest.ledger
    assert (ledger.split_rows, ledger.kept["train"]) == (1, Entry(rows=2, tokens=28))
    # The first token of each of the four documents has nothing before it that could predict it.
    assert prepared.manifest.splits["train"].num_supervised_tokens == 28 - 4


def test_long_chats_are_not_parted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(10), chat("u:hi", f"a:{LONG}"))
    message = refusal(make_recipe(path, data={"over_long": "split"}, batch={"length": 10}))
    assert "data.over_long is split, and 1 chats are longer than batch.length, which is 10; the longest has" in message


def test_strata_by_source_and_language_need_no_field(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", *rows(60, of="one"))
    two = write_lines(tmp_path / "two.jsonl", *rows(20, 100, of="two"))
    split = {"train": 0.8, "validation": 0.2, "test": 0.0, "stratify": ["source", "language"]}
    for seed in (1, 2, 3):
        prepared = prepare(make_recipe(str(one), str(two), data={"split": {**split, "seed": seed}}))
        stored = open_store(prepared.folder, "validation").rows()
        assert Counter(row["fields"]["of"] for row in stored) == {"one": 12, "two": 4}


def test_packs_in_order_and_packs_of_a_row(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(30))
    in_order = prepare(make_recipe(path, data={**ALL_TRAINED, "packing": "in_order"}))
    store = open_store(in_order.folder, "train")
    assert store.packs.tolist() == list(range(30))
    alone = prepare(make_recipe(path, data={**ALL_TRAINED, "packing": "none"}))
    assert open_store(alone.folder, "train").num_packs == 30


def test_shares_are_chosen_by_the_number_of_rows_and_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(100))
    prepared = prepare(make_recipe(path, data={"split": {}}))
    assert kept(prepared) == {"train": 85, "validation": 15}
    assert prepared.manifest.shares == (0.85, 0.15, 0.0)
    assert "100 rows" in prepared.manifest.shares_reason


def test_lengths_that_pack_badly_are_said_with_a_better_length(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(100))
    # Rows of 9 tokens: one in a pack of 16, fourteen in one of 128.
    prepared = prepare(make_recipe(path, data=ALL_TRAINED, batch={"length": 16}))
    (note,) = prepared.manifest.notes
    assert note.startswith("packs of batch.length 16 are 56.2% full")


def test_sides_do_not_move_with_the_length_of_packs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    some = [chat("u:hi", f"a:{number(value)}{' x' * (value % 9)}") for value in range(60)]
    path = write_lines(tmp_path / "rows.jsonl", *some)
    short, long = (
        prepare(make_recipe(path, data={"over_long": "drop"}, batch={"length": length})) for length in (14, 64)
    )
    assert set(held_out(short, "validation")) < set(held_out(long, "validation"))


def test_ledger_that_does_not_add_up_does_not_exist() -> None:
    whole = {"rows_in": Entry(rows=3, tokens=9), "kept": {"train": Entry(rows=3, tokens=9)}, "losses": {}}
    assert Ledger.model_validate(whole).rows_kept == 3
    for wrong in ({"rows_in": Entry(rows=4, tokens=9)}, {"rows_in": Entry(rows=3, tokens=10)}, {"tokens_cut": 1},
                  {"losses": {"vanished": Entry()}}):  # fmt: skip
        with pytest.raises(ValueError, match="rows were read|tokens were read|unknown entry"):
            Ledger.model_validate({**whole, **wrong})


def test_joined_labels_follow_chains() -> None:
    first = np.array([0, 0, 2, 2, 4, 4, 6, 7])
    second = np.array([0, 1, 1, 3, 3, 5, 5, 7])
    assert joined(first, second).tolist() == [0, 0, 0, 0, 0, 0, 0, 7]


def test_wrongly_decoded_text_is_mended_where_asked(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl", *rows(20), chat("u:hi", "a:adiÃ³s mañana"), chat("u:hi", "a:adiós mañana")
    )
    as_was, mended = (prepare(make_recipe(path, data={"fix_encoding": fix})) for fix in (False, True))
    assert [done.manifest.findings["exact_duplicates"] for done in (as_was, mended)] == [0, 1]


def test_row_is_counted_where_it_is_first_lost(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    asked = "x hi how you bye there are fine x hi bye you there"
    path = write_lines(tmp_path / "rows.jsonl", *rows(40), *([chat(f"u:{asked}", "a:fine")] * 3))
    evaluation = write_lines(tmp_path / "evaluation.jsonl", {"prompt": asked, "completion": "fine"})
    data = {
        "decontaminate": {"against": [{"path": str(evaluation)}], "action": "drop"},
        "duplicates": {"exact": "drop"},
    }
    assert losses(prepare(make_recipe(path, data=data))) == {"duplicate": 2, "contaminated": 1}


def test_the_test_rows_have_one_name_whatever_the_order_of_the_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = prepare(make_recipe(write_lines(tmp_path / "one.jsonl", *rows(60))))
    two = prepare(make_recipe(write_lines(tmp_path / "two.jsonl", *reversed(rows(60)))))
    assert one.folder != two.folder
    assert one.manifest.test_rows == two.manifest.test_rows != ""


def test_control_token_typed_by_a_user(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(20), chat("u:hi <end> <bot> you", "a:fine"))
    assert "<end>" in refusal(make_recipe(path))
    prepared = prepare(make_recipe(path, data={**ALL_TRAINED, "control_tokens": "escape"}))
    assert all(ids.count(4) == 2 for ids in documents(prepared))


def test_another_length_of_packs_breaks_no_seal(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(60))
    short, long = (prepare(make_recipe(path, batch={"length": length})) for length in (32, 64))
    (short.folder.parent / "older").mkdir()
    (short.folder.parent / "older" / "data.json").write_text("{}")
    other = prepare(make_recipe(path, data={"split": {"train": 0.7, "validation": 0.15, "test": 0.15, "seed": 7}}))
    record_look(short.folder, "first", "2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match=r"opened once: first \(2026-01-01"):
        record_look(long.folder, "second", "2026-01-02T00:00:00+00:00")
    record_look(long.folder, "second", "2026-01-02T00:00:00+00:00", again=True)
    assert [look.run for look in looks_at(short.folder)] == ["first", "second"]
    assert looks_at(other.folder) == ()


def test_few_rows_and_few_prompts_are_findings(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    asked = [chat(f"u:{number(value % 10)}", f"a:{number(value)}") for value in range(29)]
    report = audit(make_recipe(write_lines(tmp_path / "rows.jsonl", *asked)))
    found = {finding.name: finding.rows for finding in findings(report.cards[0], report.ledger)}
    assert found.items() >= {"few_rows": 29, "repeated_prompts": 19}.items()
    enough = [chat(f"u:{number(value % 15)}", f"a:{number(value)}") for value in range(30)]
    report = audit(make_recipe(write_lines(tmp_path / "enough.jsonl", *enough)))
    assert not {"few_rows", "repeated_prompts"} & {one.name for one in findings(report.cards[0], report.ledger)}


def test_step_that_is_larger_than_an_epoch_is_a_note(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(40))
    # 40 rows of 9 tokens, 7 in a pack of 64: 6 packs.
    for packs, is_larger in ((6, False), (7, True)):
        report = audit(make_recipe(path, data=ALL_TRAINED, batch={"packs": packs}))
        told = [note for note in report.notes if note.startswith("a step is larger than an epoch")]
        assert len(told) == is_larger
        assert all("batch.packs is 7, and the train rows fill 6 packs" in note for note in told)


def test_rows_of_given_test_are_not_shown(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(40))
    some = [*([chat("u:you", "a:x x x")] * 3), chat("u:you x", "a:there")]
    test = write_lines(tmp_path / "test.jsonl", *some)
    report = audit(make_recipe(path, data={"test": [{"path": str(test)}]}))
    card = report.cards[1]
    assert (card.exact_duplicates, card.short_answers, card.samples) == (2, 1, {})
    assert report.duplicates == ()
    assert not any(row.where.startswith(str(test)) for row in report.rows)


def test_sources_of_one_name_have_score_cards_of_their_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *rows(60))
    report = audit(make_recipe({"path": str(path), "rows": 30}, data={"retain": [{"path": str(path)}]}))
    assert [card.num_rows for card in report.cards] == [60, 60]
    assert len({row.where for row in report.rows}) < len(report.rows) <= 8
