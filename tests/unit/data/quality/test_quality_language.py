"""Languages of sentences that people wrote, and `und` where there is nothing to go by."""

from __future__ import annotations

import pytest

from packhorse.data.checks.language import languages

SENTENCES = {
    "en": "The train leaves at nine, and we should be there before it starts to rain.",
    "es": "El tren sale a las nueve, y deberíamos estar allí antes de que empiece a llover.",
    "fr": "Le train part à neuf heures, et nous devrions y être avant qu'il ne pleuve.",
    "de": "Der Zug fährt um neun ab, und wir sollten dort sein, bevor es zu regnen beginnt.",
    "pt": "O comboio parte às nove, e devíamos estar lá antes que comece a chover.",
    "ru": "Поезд отправляется в девять, и нам нужно быть там до начала дождя.",
    "zh": "火车九点出发，我们应该在下雨之前到那里。",
    "ja": "電車は九時に出発するので、雨が降り始める前に着いた方がいいです。",
    "ar": "يغادر القطار في التاسعة، ويجب أن نكون هناك قبل أن يبدأ المطر.",
}


def test_languages_of_sentences() -> None:
    assert languages(list(SENTENCES.values())) == list(SENTENCES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "ok",
        "12 + 4",
        "123456789012345 67890",
        "????????????",
        "1,2,3,4,5;6,7,8,9 10%",
        "d41d8cd98f00b204e9800998ecf8427e",
        "\ud800" * 2,
    ],
)
def test_too_little_to_say(text: str) -> None:
    assert languages([text]) == ["und"]


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    assert languages([SENTENCES["es"] * 10 + SENTENCES["ru"] * 1000]) == ["es"]


def test_a_row_does_not_hang_on_its_batch() -> None:
    texts = [*SENTENCES.values(), "", "ok"] * 3
    assert languages(texts) == [languages([text])[0] for text in texts]
