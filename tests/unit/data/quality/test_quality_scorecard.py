"""A card over rows made by hand: every count is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.data.checks.counters import make_sample
from packhorse.data.checks.scorecard import ScoreCard, ScoreKeeper
from packhorse.data.formats.example import Example, Message

ASKED = "What did the old man on the bridge say to the two dogs this morning?"
ANSWER = "He said that it would rain before noon, and they went home."
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def row(answer: str = ANSWER, prompt: str = ASKED, **more: Any) -> Example:
    turns = (Message("user", prompt), Message("assistant", answer, **more.pop("turn", {})))
    return Example(turns, None, more.pop("fields", {}), more.pop("where", "rows.jsonl:1"), **more)


def card_of(rows: list[Example], tokens: list[int] | None = None, **counts: int) -> ScoreCard:
    keeper = ScoreKeeper("rows.jsonl")
    for start in range(0, len(rows), 4):
        keeper.add(rows[start : start + 4], (tokens or [50] * len(rows))[start : start + 4])
    return keeper.card(**{"exact_duplicates": 0, "near_duplicates": 0, "contradictions": 0, **counts})


def test_a_sound_source_has_nothing_to_tell() -> None:
    card = card_of([row()] * 9)
    assert (card.source, card.num_rows, card.languages, card.labels) == ("rows.jsonl", 9, {"en": 9}, {})
    assert (card.short_answers, card.length_outliers, card.personal, card.broken_encoding) == (0, 0, {}, 0)
    assert card.samples == {}


def test_no_rows() -> None:
    card = card_of([])
    assert (card.num_rows, card.languages, card.length_outliers, card.samples) == (0, {}, 0, {})


def test_counts_over_all_rows_are_handed_through() -> None:
    card = card_of([row()] * 3, exact_duplicates=2, near_duplicates=1, contradictions=3)
    assert (card.exact_duplicates, card.near_duplicates, card.contradictions) == (2, 1, 3)


def test_languages_by_frequency() -> None:
    spanish = row("Dijo que llovería antes del mediodía, y se fueron a casa.", "¿Qué dijo el viejo del puente?")
    assert list(card_of([spanish, row(), row(), row("7", "1")]).languages.items()) == [("en", 2), ("es", 1), ("und", 1)]


def test_a_long_system_prompt_is_not_the_language_of_the_row() -> None:
    system = Message("system", "Du bist ein freundlicher Helfer und antwortest immer kurz und höflich. " * 10)
    plain = row()
    card = card_of([Example((system, *(plain.messages or ())), None, {}, "")])
    assert card.languages == {"en": 1}


@pytest.mark.parametrize("name", ["label", "category"])
def test_labels_of_a_field(name: str) -> None:
    rows = [row(fields={name: value}) for value in ("card", "card", "fee", True)]
    assert card_of(rows).labels == {"card": 2, "fee": 1, "True": 1}


def test_a_field_of_ever_other_values_is_no_label() -> None:
    assert card_of([row(fields={"label": f"id {number}"}) for number in range(1200)]).labels == {}


def test_one_word_answers_are_labels_where_most_are() -> None:
    card = card_of([row("yes")] * 5 + [row("no")] * 2 + [row()])
    assert (card.short_answers, card.labels) == (0, {"yes": 5, "no": 2})


def test_short_and_empty_answers() -> None:
    rows = [row()] * 6 + [row("18", where="rows.jsonl:7"), row(" \n", where="rows.jsonl:8")]
    card = card_of(rows)
    assert (card.short_answers, card.labels) == (2, {})
    assert {sample.where for sample in card.samples["short_answers"]} == {"rows.jsonl:7", "rows.jsonl:8"}


def test_an_empty_answer_counts_among_labels_too() -> None:
    assert card_of([row("yes")] * 5 + [row("")]).short_answers == 1


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(row("", turn={"tool_calls": (CALL,)}), id="a call is an answer"),
        pytest.param(row("今日は雨が降っている"), id="no spaces between words"),
        pytest.param(Example(None, "word", {}, ""), id="plain text has no answer"),
        pytest.param(row("Ja."), id="control"),
    ],
)
def test_what_a_short_answer_is(example: Example) -> None:
    expected = 1 if example.messages and example.messages[-1].content == "Ja." else 0
    assert card_of([row(), row(), example]).short_answers == expected


def test_length_outliers_are_above_the_outer_fence() -> None:
    lengths = [10, 20, 40, 50, 500, 501, *[30] * 9]
    card = card_of([row(where=f"rows.jsonl:{at}") for at in range(1, 16)], lengths)
    # Sorted: 10 20 30×9 40 50 500 501; Q1 is at place 3.5 (30), Q3 at 10.5 (between 30 and 40: 35), fence 35 + 3 × 5.
    assert card.length_outliers == 2
    assert [sample.where for sample in card.samples["length_outliers"]] == ["rows.jsonl:6", "rows.jsonl:5"]


def test_lengths_that_hardly_differ_have_no_outliers() -> None:
    # Q1 = Q3 = 120: the fence is 120 too.
    assert card_of([row()] * 60, [119] * 5 + [120] * 44 + [121] * 11).length_outliers == 0
    assert card_of([row()] * 60, [120] * 58 + [240, 241]).length_outliers == 1


def test_chats_that_end_without_an_answer() -> None:
    turns = (*(row().messages or ()), Message("user", "And then?"))
    card = card_of([row(), Example(turns, None, {}, "rows.jsonl:2"), Example(None, "plain text", {}, "")])
    assert (card.unanswered, card.samples["unanswered"][0].where) == (1, "rows.jsonl:2")


@pytest.mark.parametrize(
    ("example", "number"),
    [
        pytest.param(row("Dear {{customer_name}}, it is on its way."), 1, id="name"),
        pytest.param(row("Dear {{ Customer Name }}, your {{ order.id }}."), 1, id="counted by row"),
        pytest.param(Example(None, "Hello {{name}}", {}, ""), 1, id="plain text"),
        pytest.param(row(prompt="Hello {{name}}"), 0, id="not trained"),
        pytest.param(row("Hello {{name}}", turn={"trained": False}), 0, id="masked turn"),
        pytest.param(row("run: echo ${{ secrets.TOKEN }}"), 0, id="workflow"),
        pytest.param(row(r"It is \frac{{ab}}{{cd}}."), 0, id="latex"),
        pytest.param(row('{"a": {"b": {}}}'), 0, id="json"),
    ],
)
def test_placeholders_that_are_trained(example: Example, number: int) -> None:
    assert card_of([example, row()]).placeholders == number


def test_placeholders_of_users_where_they_are_trained() -> None:
    keeper = ScoreKeeper("rows.jsonl", ["user", "assistant"])
    keeper.add([row(prompt="Hello {{name}}")], [9])
    assert keeper.card(0, 0, 0).placeholders == 1


def test_prompts_that_begin_alike() -> None:
    same = [row(prompt=f"What is the capital of {place}?") for place in "abcdefghij"]
    other = [row(prompt=f"{number} is a number, is it?") for number in range(10)]
    card = card_of([*same, *other])
    assert card.same_opening == 10
    assert "What is the capital of a?" in card.samples["same_opening"][0].text
    assert card_of([*same, *other, row()]).same_opening == 0
    assert card_of(same[:9]).same_opening == 0


def test_fields_with_few_values_are_strata() -> None:
    fields = [
        {"style": "short" if at % 4 else "long", "confidence": at / 10, "id": at, "category": at % 2, "x": 1}
        for at in range(8)
    ]
    rows = [row(fields=of_row) for of_row in fields]
    rows[0].fields["confidence"] = 1.0
    card = card_of([*rows, *rows])
    assert card.labels == {"0": 8, "1": 8}
    assert card.strata["style"] == {"short": 12, "long": 4}
    assert card.strata["confidence"]["0.9 to 1.0"] == 2
    assert card.strata["confidence"]["0.1 to 0.2"] == 2
    assert card.strata.keys() == {"style", "confidence", "id"}
    assert card_of(rows).strata.keys() == {"style"}


def test_personal_data_is_counted_by_row_and_shown_masked() -> None:
    rows = [row(f"Write to ann{at}@mail.org or bob@mail.org." + "!" * at, where=f"rows.jsonl:{at}") for at in range(5)]
    rows.append(row("His number is 219-09-9999, I think."))
    card = card_of(rows)
    assert card.personal == {"email": 5, "social_security_number": 1}
    assert [sample.where for sample in card.samples["personal:email"]] == [
        "rows.jsonl:0",
        "rows.jsonl:1",
        "rows.jsonl:2",
    ]
    assert "Write to [email] or [email]." in card.samples["personal:email"][0].text
    assert "mail.org" not in repr(card)
    assert "9999" not in repr(card)


def test_broken_encoding_is_counted_and_shown() -> None:
    card = card_of([row(), row("Il est allÃ© chez FranÃ§oise hier soir."), row("a\ufffdb and so on")])
    assert card.broken_encoding == 2
    assert "FranÃ§oise" in card.samples["broken_encoding"][0].text
    late = card_of([row("a sound sentence, " * 20 + "and allÃ© at its end. " + "And more, " * 20)])
    assert "allÃ© at its end" in late.samples["broken_encoding"][0].text


def test_preference_rows_are_read_on_both_sides() -> None:
    rejected = (Message("assistant", "Call me: 212-555-0187"),)
    assert card_of([row(rejected=rejected)]).personal == {"phone": 1}


def test_samples_are_short_and_show_what_they_are_for() -> None:
    text = "long " * 100 + "write to a.b@mail.org now " + "tail " * 100
    sample = make_sample("rows.jsonl:3", text, "[email]")
    assert "write to [email] now" in sample.text
    assert len(sample.text) == 120
    assert (sample.text[0], sample.text[-1]) == ("…", "…")
    assert make_sample("", "one\n two").text == "one two"
    # Cut first, half an address would be left.
    assert "a.b" not in make_sample("", "x " * 57 + "a.b@mail.org").text
