"""The quickstart's corpus: right answers, no prompt twice, the same bytes everywhere."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from packhorse.quickstart.files import materialise
from quickstart_corpus.__main__ import corpus_texts
from quickstart_corpus.corpus import Row, core_rows, ticket_rows
from quickstart_corpus.families import MONTHS
from quickstart_corpus.phrases import BAD_EN, BAD_ES, GOOD_EN, GOOD_ES
from quickstart_corpus.rows import LANGUAGES
from quickstart_corpus.tickets import DEADLINES, TOPICS

FACTORS = {
    ("kilometres", "metres"): 1000,
    ("kilómetros", "metros"): 1000,
    ("metres", "centimetres"): 100,
    ("metros", "centímetros"): 100,
    ("kilograms", "grams"): 1000,
    ("kilos", "gramos"): 1000,
    ("litres", "millilitres"): 1000,
    ("litros", "mililitros"): 1000,
    ("hours", "minutes"): 60,
    ("horas", "minutos"): 60,
    ("weeks", "days"): 7,
    ("semanas", "días"): 7,
}
TEAM_WORDS = {
    "BILLING": "factura|invoice",
    "SHIPPING": "paquete|envío|parcel|shipment",
    "ACCESS": "cuenta|contraseña|account|password",
    "RETURNS": "(?i)devol|return",
    "TECH": r"aplicación|error|\bapp\b",
    "SALES": "presupuesto|precio|descuento|quote|price|discount",
}
PRIORITY_WORDS = {
    "P1": "urgent|hoy|today",
    "P2": "semana|unos días|week|few days",
    "P3": "prisa|uede esperar|hurry|can wait",
}


@cache
def all_rows() -> tuple[Row, ...]:
    return (*core_rows(), *ticket_rows())


def rows_of(family: str) -> list[Row]:
    rows = [row for row in all_rows() if row.family == family]
    assert rows
    return rows


def test_no_prompt_stands_twice() -> None:
    counts = Counter(row.task.prompt for row in all_rows())
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_both_languages_have_equally_many_rows_of_each_family() -> None:
    counts = Counter((row.family, row.language) for row in all_rows())
    families = {row.family for row in all_rows()}
    assert len(families) == 11
    for family in families:
        assert len({counts[family, language] for language in LANGUAGES}) == 1


def test_the_core_has_no_ticket() -> None:
    assert "tickets" not in {row.family for row in core_rows()}
    assert {row.family for row in ticket_rows()} == {"tickets"}


def test_no_text_has_loose_spaces_or_open_placeholders() -> None:
    for row in all_rows():
        for text in (row.task.prompt, row.task.answer):
            assert text == text.strip()
            assert "  " not in text
            assert row.family == "extraction" or "{" not in text


def test_units_are_right() -> None:
    for row in rows_of("units"):
        many = int(re.findall(r"\d+", row.task.prompt)[0])
        number, target = row.task.answer.split()
        source = re.search(rf"\b{many} (\w+)", row.task.prompt)
        assert source is not None
        assert int(number) == many * FACTORS[source[1], target]


def test_dates_are_right() -> None:
    for row in rows_of("dates"):
        text, answer = row.task.text, row.task.answer
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            assert datetime.date.fromisoformat(text).strftime("%d/%m/%Y") == answer
            continue
        date = datetime.date.fromisoformat(answer)
        month = MONTHS[row.language][date.month - 1]
        assert re.findall(r"\d+", text) == [str(date.day), str(date.year)]
        assert month in text


def test_sorting_is_right() -> None:
    down = ("largest to smallest", "descending", "mayor a menor", "decreciente")
    for row in rows_of("sorting"):
        numbers = [int(number) for number in row.task.text.split(", ")]
        reverse = any(words in row.task.instruction for words in down)
        assert sorted(numbers, reverse=reverse) == json.loads(f"[{row.task.answer}]")


def test_extraction_gives_json_with_words_of_the_text() -> None:
    keys = {"es": ["nombre", "edad", "ciudad"], "en": ["name", "age", "city"]}
    for row in rows_of("extraction"):
        found = json.loads(row.task.answer)
        assert list(found) == keys[row.language]
        assert all(re.search(rf"\b{value}\b", row.task.text) for value in found.values())


def test_sentiment_follows_from_the_polarity_words() -> None:
    good = {word for pair in GOOD_ES for word in pair} | set(GOOD_EN)
    bad = {word for pair in BAD_ES for word in pair} | set(BAD_EN)
    labels = {
        2: ("positiva", "positive"),
        1: ("mixta", "mixed"),
        0: ("negativa", "negative"),
    }
    for row in rows_of("sentiment"):
        clauses = re.split(r" (?:y|pero|and|but) ", row.task.text.removesuffix("."))
        said = [re.split(r" (?:fue|was) ", clause)[1] for clause in clauses]
        assert all((word in good) != (word in bad) for word in said)
        assert row.task.answer in labels[sum(word in good for word in said)]


def test_spanish_plurals_agree() -> None:
    articles = {"el": "los", "la": "las"}
    for row in rows_of("plural"):
        if row.language == "es":
            one, many = row.task.text.split(), row.task.answer.split()
            assert many[0] == articles[one[0]]
            assert all(word.endswith("s") for word in many)
            assert not one[2].endswith("a" if one[0] == "el" else "o")


def test_greetings_fit_the_hour() -> None:
    for row in rows_of("greeting"):
        hour = int(re.findall(r"(\d\d):\d\d", row.task.prompt)[0])
        part = 0 if hour < 12 else 1 if hour < 18 else 2
        words = (("días", "tardes", "noches"), ("morning", "afternoon", "evening"))
        assert words[row.language == "en"][part] in row.task.answer
        assert row.task.answer.split(", ")[1].removesuffix(".") in row.task.prompt


def test_refusals_speak_the_language_of_the_row() -> None:
    for row in rows_of("refusal"):
        assert row.task.answer.startswith("Lo siento" if row.language == "es" else "Sorry")


def test_tickets_are_routed_by_problem_and_urgency() -> None:
    for row in rows_of("tickets"):
        teams = [team for team, words in TEAM_WORDS.items() if re.search(words, row.task.text)]
        priorities = [level for level, words in PRIORITY_WORDS.items() if re.search(words, row.task.text)]
        assert (len(teams), len(priorities)) == (1, 1), row.task.text
        assert row.task.answer == f"{teams[0]}/{priorities[0]}"


def test_the_inbox_is_read_right() -> None:
    answers = dict(zip(TEAM_WORDS, zip(TOPICS.es, TOPICS.en))) | dict(
        zip(PRIORITY_WORDS, zip(DEADLINES.es, DEADLINES.en))
    )
    for row in rows_of("inbox"):
        topic = "tema" in row.task.instruction or "trata" in row.task.instruction
        topic = topic or "topic" in row.task.instruction or "about" in row.task.instruction
        words = TEAM_WORDS if topic else PRIORITY_WORDS
        found = [answers[key] for key, pattern in words.items() if re.search(pattern, row.task.text)]
        assert len(found) == 1
        assert row.task.answer == found[0][row.language == "en"]


def test_every_ticket_code_is_asked_for_equally_often() -> None:
    counts = Counter(row.task.answer for row in rows_of("tickets"))
    assert len(counts) == 18
    assert max(counts.values()) < 2 * min(counts.values())


def test_alpaca_rows_hold_the_same_tasks_as_the_chats() -> None:
    texts = corpus_texts()
    for name in ("core", "tickets"):
        chats = [json.loads(line) for line in texts[f"{name}.messages.jsonl"].splitlines()]
        alpaca = [json.loads(line) for line in texts[f"{name}.alpaca.jsonl"].splitlines()]
        assert len(chats) == len(alpaca)
        for chat, row in zip(chats, alpaca, strict=True):
            prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            assert [turn["content"] for turn in chat["messages"][-2:]] == [prompt, row["output"]]
            assert (chat["language"], chat["family"]) == (row["language"], row["family"])


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("core.messages.jsonl", "ffd43a105e829ffab207b721dce39a4988d544f68b62379710078c2bfd258b1b"),
        ("core.alpaca.jsonl", "4b1aedb3dfa7f6ed835654ae3c459bb1a84d278fe8fc4a9443d868c0279188fc"),
        ("tickets.messages.jsonl", "92c68b4cbc65e1e2ea5d91c4160d369748e72b12071acb2d1025768ba06f6305"),
        ("tickets.alpaca.jsonl", "3913d17318b8d30de080a1f24b89613a1d14b71683e2fc131a9620f40d9632dc"),
    ],
)
def test_the_shipped_files_have_the_bytes_that_the_generator_makes(name: str, digest: str, tmp_path: Path) -> None:
    shipped = materialise(name, tmp_path).read_bytes()
    assert hashlib.sha256(shipped).hexdigest() == digest
    assert corpus_texts()[name].encode() == shipped
