"""Rows of two documents: preference pairs, and answers with a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import TEMPLATE, MakeRecipe, save_tiny_tokenizer, write_lines

from packhorse.data.audit import audit
from packhorse.data.content_key import content_key
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader, make_micro_batch, part_of_row
from packhorse.data.packs.store import PackStore, open_store
from packhorse.data.prepare import PreparedData, prepare
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe

USER, BOT, END = 1, 2, 4
HI, THERE, FINE, BYE = 6, 7, 11, 12
TRAIN = {"split": {"train": 1, "validation": 0, "test": 0}}
LENGTHS = (1, 5, 2, 9, 3, 7, 1, 4)


def with_objective(recipe: Recipe, objective: Any) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(exclude={"method"}), "objective": objective})


def pair(number: int) -> dict[str, Any]:
    """A pair whose prompt names it: `hi` and number times `there`."""
    words = LENGTHS[number % len(LENGTHS)]
    return {"prompt": f"hi {'there ' * number}you", "chosen": "fine " * words + "x", "rejected": "bye " * (words + 1)}


def verdict(number: int) -> dict[str, Any]:
    good = number % 2 == 0
    words = LENGTHS[number % len(LENGTHS)] + number // len(LENGTHS)
    return {"prompt": f"hi {'there ' * number}you", "completion": ("fine " if good else "bye ") * words, "label": good}


def prepared(recipe: Recipe, objective: Any) -> PreparedData:
    return prepare(with_objective(recipe, objective))


def refused(recipe: Recipe, objective: Any) -> str:
    with pytest.raises(UserError) as raised:
        prepared(recipe, objective)
    return str(raised.value)


def number_of(ids: list[int]) -> int:
    """The number of a row, from its prompt."""
    return ids[: ids.index(BOT)].count(THERE)


def answer_of(ids: list[int]) -> list[int]:
    return ids[ids.index(BOT) + 1 :]


def documents(store: PackStore) -> list[list[int]]:
    return [store.document(at)[0].tolist() for at in range(store.num_documents)]


def test_a_pair_is_two_documents_with_one_prompt(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "hi", "chosen": "fine", "rejected": "bye x", "margin": 2})
    data = prepared(make_recipe(path, data=TRAIN), "dpo")
    store = open_store(data.folder, "train")
    assert documents(store) == [[USER, HI, END, BOT, FINE, END], [USER, HI, END, BOT, BYE, 13, END]]
    assert [store.document(at)[1].tolist() for at in (0, 1)] == [[0] * 4 + [1] * 2, [0] * 4 + [1] * 3]
    assert store.values["margin"].tolist() == [2, 2]
    assert (data.manifest.documents_per_row, data.manifest.splits["train"].num_rows) == (2, 1)
    assert data.manifest.ledger.kept["train"].tokens == 13


@pytest.mark.parametrize("packing", ["mixed", "best_fit", "in_order", "none"])
def test_both_answers_share_a_pack(make_recipe: MakeRecipe, tmp_path: Path, packing: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *map(pair, range(40)))
    recipe = make_recipe(path, data={"packing": packing}, batch={"length": 160})
    data = prepared(recipe, "dpo")
    for split in ("train", "validation"):
        store = open_store(data.folder, split)
        ids = documents(store)
        for pack in range(store.num_packs):
            indices = store.documents_of(pack)
            assert (indices[::2] % 2 == 0).all()
            assert (indices[1::2] == indices[::2] + 1).all()
        assert sorted(store.packs.tolist()) == list(range(store.num_documents))
        for chosen, rejected in zip(ids[::2], ids[1::2]):
            row = pair(number_of(chosen))
            assert number_of(rejected) == number_of(chosen)
            assert answer_of(chosen).count(FINE) == row["chosen"].count("fine")
            assert answer_of(rejected).count(BYE) == row["rejected"].count("bye")
        assert store.num_units == data.manifest.splits[split].num_rows == len(ids) // 2
    rows = list(open_store(data.folder, "validation").rows())
    assert [row["rejected"][0]["content"].count("bye") for row in rows] == [
        answer_of(ids).count(BYE) for ids in documents(open_store(data.folder, "validation"))[1::2]
    ]


def test_kto_rows_have_the_answer_of_another_row_of_their_side(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [verdict(number) for number in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", *rows, *rows[:5])
    data = prepared(make_recipe(path, batch={"length": 160}), "kto")
    for split in ("train", "validation"):
        store = open_store(data.folder, split)
        ids = documents(store)
        own = {number_of(document): answer_of(document) for document in ids[::2]}
        assert store.values["verdict"].tolist()[::2] == [float(number_of(each) % 2 == 0) for each in ids[::2]]
        assert set(store.values["verdict"].tolist()[1::2]) == {0.0}
        for at, (answer, mismatched) in enumerate(zip(ids[::2], ids[1::2])):
            assert number_of(mismatched) == number_of(answer)
            others = {tuple(other) for number, other in own.items() if number != number_of(answer)}
            assert tuple(answer_of(mismatched)) in others
            assert abs(len(mismatched) - len(answer)) <= 4  # by chance, lengths would differ by up to 12
            assert store.document(2 * at + 1)[1].tolist() == [0] * (mismatched.index(BOT) + 1) + [1] * len(
                answer_of(mismatched)
            )
        assert data.manifest.splits[split].num_supervised_tokens == sum(len(answer_of(each)) for each in ids)


def test_partners_do_not_depend_on_the_order_of_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [verdict(number) for number in range(30)]
    found = []
    for name, listed in (("one", rows), ("two", rows[::-1])):
        path = write_lines(tmp_path / f"{name}.jsonl", *listed)
        store = open_store(prepared(make_recipe(path, batch={"length": 160}), "kto").folder, "train")
        ids = documents(store)
        found.append({number_of(answer): mismatched for answer, mismatched in zip(ids[::2], ids[1::2])})
    assert found[0] == found[1]


def test_copies_alone_have_no_partner(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", verdict(1), verdict(1))
    recipe = make_recipe(path, data=TRAIN)
    assert "all train rows are equal (number of rows: 2)" in refused(recipe, "kto")


@pytest.mark.parametrize(
    ("template", "row", "fact"),
    [
        pytest.param(
            TEMPLATE.replace("<user>", "<user>{% if messages[-1]['content'] == 'bye' %}x {% endif %}"),
            {"prompt": "hi", "chosen": "fine", "rejected": "bye"},
            "the prompt has other ids before the chosen answer than before the rejected one, from token 1 on",
            id="prompt depends on the answer",
        ),
        pytest.param(
            TEMPLATE,
            {"prompt": "hi", "chosen": "fine you", "rejected": "fine  you"},
            "chosen and rejected have equal ids",
            id="equal ids",
        ),
    ],
)
def test_pairs_that_compare_nothing_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, template: str, row: dict[str, Any], fact: str
) -> None:
    tokenizer = save_tiny_tokenizer(tmp_path / "other", template)
    path = write_lines(tmp_path / "rows.jsonl", pair(1), row)
    message = refused(make_recipe(path, model={"tokenizer": str(tokenizer)}), "dpo")
    assert fact in message
    assert f"{path}:2" in message


def test_mistakes_in_a_rejected_answer_name_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "hi", "chosen": "fine", "rejected": "bye <end> x"})
    assert f"{path}:1 (rejected)" in refused(make_recipe(path), "dpo")


def test_both_documents_must_fit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *map(pair, range(20)))
    longest = max(2 * (number + 5) + 2 * LENGTHS[number % 8] + 4 for number in range(20))
    message = refused(make_recipe(path, batch={"length": longest - 1}), "dpo")
    assert f"the longest has {longest} tokens in its two documents" in message
    assert f"{longest} (fits all)" in message
    assert prepared(make_recipe(path, batch={"length": longest}), "dpo").manifest.ledger.rows_kept == 20
    dropped = prepared(make_recipe(path, batch={"length": longest - 1}, data={"over_long": "drop"}), "dpo")
    assert dropped.manifest.ledger.losses["over_long"].rows == 1


@pytest.mark.parametrize(
    ("objective", "row", "fact", "fix"),
    [
        pytest.param("sft", pair(1), "has preference pairs (format preference), and objective is sft",
                     "set objective to dpo or ipo", id="pairs for sft"),
        pytest.param("sft", pair(1), "", "packhorse convert", id="pairs can be converted"),
        pytest.param("dpo", {"prompt": "hi", "completion": "fine"}, "has answers to imitate (format prompt_completion)",
                     "set objective to sft", id="answers for dpo"),
        pytest.param("dpo", verdict(1), "has answers with a verdict (format kto)", "set objective to kto",
                     id="verdicts for dpo"),
        pytest.param("kto", pair(1), "which takes answers with a verdict", "--to kto", id="pairs for kto"),
        pytest.param("sft", verdict(1), "which takes answers to imitate", "--to chosen", id="verdicts for sft"),
    ],
)  # fmt: skip
def test_rows_that_the_objective_does_not_take(
    make_recipe: MakeRecipe, tmp_path: Path, objective: str, row: dict[str, Any], fact: str, fix: str
) -> None:
    message = refused(make_recipe(write_lines(tmp_path / "rows.jsonl", row)), objective)
    assert fact in message
    assert fix in message


def test_objectives_of_one_kind_of_rows_share_their_data(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(write_lines(tmp_path / "rows.jsonl", pair(1)))
    distil = {"kind": "distil", "teacher": {"id": "a/b"}}
    keys = [content_key(with_objective(recipe, each)) for each in ("sft", distil, "dpo", "reward", "kto")]
    assert keys[0] == keys[1] == content_key(recipe)
    assert keys[2] == keys[3]
    assert len(set(keys)) == 3


def test_micro_batches_of_pairs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{**pair(number), "margin": number} for number in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    store = open_store(prepared(make_recipe(path, batch={"length": 160}), "reward").folder, "train")
    whole = make_micro_batch(store, np.array([0, 1]))
    assert whole.documents.tolist() == [*store.documents_of(0), *store.documents_of(1)]
    ends = np.cumsum(whole.document_lengths)
    assert whole.document_of.tolist() == np.searchsorted(ends, whole.predicting.numpy(), "right").tolist()
    assert whole.value_names == ("margin",)
    assert whole.values is not None
    assert whole.values[:, 0].tolist() == [number_of(store.document(at)[0].tolist()) for at in whole.documents]
    parts = [part_of_row(whole, rank, 3) for rank in range(3)]
    assert [at for part in parts for at in part.document_of.tolist()] == whole.document_of.tolist()
    assert all(part.documents.tolist() == whole.documents.tolist() for part in parts)
    assert make_micro_batch(store, np.zeros(0, np.int64)).documents.tolist() == []


def test_a_step_divides_by_the_mean_pairs_of_the_epoch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *map(pair, range(40)))
    data = prepared(make_recipe(path, batch={"length": 160}), "dpo")
    store = open_store(data.folder, "train")
    plan = BatchPlan(store.pack_costs, 3, 0)
    steps = []
    for rank in range(2):
        loader = PackLoader(store, plan, rank, 2, 1, False)
        steps.append([loader.step(k) for k in range(plan.num_steps_per_epoch)])
        loader.close()
    assert len({step.divisor for of_rank in steps for step in of_rank}) == 1
    for pieces in zip(*steps):
        held = sum(len(batch.documents) // 2 for step in pieces for batch in step.micro_batches)
        assert {step.num_units for step in pieces} == {held}
    num_rows = data.manifest.splits["train"].num_rows
    assert sum(step.num_units for step in steps[0]) == num_rows
    assert steps[0][0].divisor == num_rows / plan.num_steps_per_epoch


def test_check_shows_both_answers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *map(pair, range(20)))
    rows = audit(with_objective(make_recipe(path, batch={"length": 160}, data=TRAIN), "dpo")).rows
    assert rows[0].where == f"{path}:1, chosen: 3 supervised tokens"
    assert rows[1].where == f"{path}:1, rejected: 3 supervised tokens"
    assert [text for text, supervised in rows[1].pieces if supervised] == ["bye bye <end>"]


def notes(recipe: Recipe, objective: Any) -> str:
    return "\n".join(audit(with_objective(recipe, objective)).notes)


def test_check_counts_what_pairs_have_besides_quality(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    longer = [{"prompt": f"hi {'x ' * at}", "chosen": "fine " * 7, "rejected": "bye"} for at in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", *longer)
    recipe = make_recipe(path, batch={"length": 160})
    assert "the chosen answers have 8 supervised tokens on average, the rejected ones 2: 4.0 times as many" in notes(
        recipe, "dpo"
    )
    even = write_lines(tmp_path / "even.jsonl", *map(pair, range(20)))
    assert "supervised tokens on average" not in notes(make_recipe(even, batch={"length": 160}), "dpo")


def test_check_counts_good_and_bad_answers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *(verdict(number) for number in range(40) if number % 2 or number < 10))
    recipe = make_recipe(path, batch={"length": 160}, data=TRAIN)
    assert "5 good and 20 bad answers" in notes(recipe, "kto")
    assert "objective.desirable_weight to 4" in notes(recipe, "kto")
    assert "good and 20 bad" not in notes(recipe, {"kind": "kto", "desirable_weight": 4.0})


def test_check_says_how_many_pairs_a_step_has(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *map(pair, range(40)))
    recipe = with_objective(make_recipe(path, batch={"length": 160}), "dpo")
    store = open_store(prepare(recipe).folder, "train")
    plan = BatchPlan(store.pack_costs, recipe.batch.packs, recipe.seed, store.in_order)
    full = store.num_packs // recipe.batch.packs
    counts = [int(store.pack_units[plan.packs(k)].sum()) for k in range(full)]
    note = f"{np.mean(counts):.3g} pairs per step on average, {min(counts)} to {max(counts)}"
    assert note in "\n".join(audit(recipe).notes)


def test_values_are_part_of_what_is_checked(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = prepared(make_recipe(write_lines(tmp_path / "rows.jsonl", *map(verdict, range(9))), data=TRAIN), "kto")
    files = json.loads((data.folder / "data.json").read_text())["splits"]["train"]["files"]
    assert "values/verdict.npy" in files
