"""Runs of words that stand in both, against a plain loop over word lists."""

from __future__ import annotations

import random
import re

import pytest

from packhorse.data.checks.contamination import EvaluationIndex

ASKED = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(ASKED, True, id="as it is"),
        pytest.param(f"Question: {ASKED}\nAnswer: 3", True, id="within more"),
        pytest.param(ASKED.upper().replace(" ", "\n  ").replace("?", "!!"), True, id="case, space, punctuation"),
        pytest.param(ASKED.replace("fiber", "“fiber”"), True, id="quotes beyond ASCII"),
        pytest.param(ASKED.replace("blue", "red"), True, id="13 words after a change"),
        pytest.param(ASKED.replace("blue", "red").replace("many", "few"), False, id="no 13 words in a row"),
        pytest.param("A robe takes 2 bolts of blue fiber and half that much", False, id="12 words"),
        pytest.param("", False, id="nothing"),
    ],
)
def test_thirteen_words_in_a_row(text: str, found: bool) -> None:
    assert EvaluationIndex(["another question", ASKED], 13).hits(["before", text, "after"]) == [False, found, False]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param("Where is my card?", True, id="the whole"),
        pytest.param("where is MY card", True, id="case and punctuation"),
        pytest.param("Where is my card?\ncard_arrival", True, id="a turn"),
        pytest.param("Tell me: where is my card?", False, id="within a line"),
        pytest.param("Where is my", False, id="less"),
        pytest.param("Where is my card now?", False, id="more"),
    ],
)
def test_a_short_text_is_found_as_a_whole_line(text: str, found: bool) -> None:
    assert EvaluationIndex(["Where is my card?"], 13).hits([text]) == [found]


def test_accents_and_case_beyond_ascii() -> None:
    index = EvaluationIndex(["¿CUÁNTOS rollos se necesitan EN ESPAÑA?"], 3)
    assert index.hits(["cuántos rollos se", "cuantos rollos de", "en españa, sí: se necesitan en españa"]) == [
        True,
        False,
        True,
    ]


def test_hits_are_those_of_a_plain_loop() -> None:
    draw = random.Random(4)

    def text(most: int) -> str:
        return " ".join(draw.choice("abcdef") + draw.choice(["", ",", "!"]) for _ in range(draw.randrange(4, most)))

    def grams(words: str) -> set[tuple[str, ...]]:
        found = re.findall(r"\w+", words)
        return {tuple(found[at : at + 4]) for at in range(len(found) - 3)}

    asked, rows = [text(12) for _ in range(25)], [text(14) for _ in range(400)]
    known = set().union(*map(grams, asked))
    expected = [bool(grams(row) & known) for row in rows]
    assert EvaluationIndex(asked, 4).hits(rows) == expected
    assert 50 < sum(expected) < 350


@pytest.mark.parametrize("asked", [[], [""], ["?!"]], ids=["no texts", "empty", "no words"])
def test_an_evaluation_that_asks_nothing_finds_nothing(asked: list[str]) -> None:
    assert EvaluationIndex(asked, 13).hits(["", "a", ASKED]) == [False, False, False]
    assert EvaluationIndex(asked, 13).hits([]) == []
