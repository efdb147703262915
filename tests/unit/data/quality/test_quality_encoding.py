"""Damage is made here by decoding with the wrong code; sound text in many scripts stays as it is."""

from __future__ import annotations

import pytest

from packhorse.data.checks.encoding import broken_encoding, fix_encoding_errors

SOUND = [
    'Plain text: 3 < 4 && "quoted" – it\'s fine.\n\tTabs\r\ntoo.',
    "El niño comió piñas; ¿qué más? «Ándale», dijo él… “sí” y ‘no’. ¡Olé! 20 €",
    "Château, œuvre, garçon, Île-de-France, à l’été",
    "Größe, Straße, Übermut – „so“ sagt man; 5 °C, 3 × 4 ÷ 2 ± 1 µm",
    "Привет, мир! Съешь ещё этих мягких булок",
    "今日は雨です。「はい」と言った。",
    "مرحبا بالعالم، كيف حالك؟",
    "αβγ ≤ ∞, ∑ x² → ½, ﬁne ligature, full ｗｉｄｔｈ, emoji 👩‍👩‍👧 ☕️",
    "SÃO PAULO, CORAÇÃO, Ângela, Âmbar",
    "",
]


@pytest.mark.parametrize("text", SOUND, ids=lambda text: text[:12] or "empty")
def test_sound_text_is_left_as_it_is(text: str) -> None:
    assert (broken_encoding(text), fix_encoding_errors(text)) == (False, text)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param("Más información: el niño comió", "latin-1", id="Spanish as Latin-1"),
        pytest.param("Más información: el niño comió", "windows-1252", id="Spanish as Windows-1252"),
        pytest.param("don’t say “no” – ever…", "windows-1252", id="quotes"),
        pytest.param("Françoise, fiancée", "latin-1", id="French"),
        pytest.param("Größe und Straße", "windows-1252", id="German"),
        pytest.param("Привет, мир", "windows-1252", id="Russian"),
    ],
)
def test_wrong_decoding_is_undone(text: str, code: str) -> None:
    # Windows-1252 has no letter for five bytes; decoders write those as they are.
    wrong = "".join(bytes([byte]).decode(code, "ignore") or chr(byte) for byte in text.encode())
    assert wrong != text
    assert (broken_encoding(wrong), fix_encoding_errors(wrong)) == (True, text)


def test_twice_wrong_is_undone_twice() -> None:
    wrong = "información".encode().decode("windows-1252").encode().decode("windows-1252")
    assert fix_encoding_errors(wrong) == "información"


def test_a_sound_line_does_not_keep_another_from_being_mended() -> None:
    assert fix_encoding_errors("señor “Ángel”\nel niÃ±o comiÃ³") == "señor “Ángel”\nel niño comió"
    # Read as Mac Roman, which has no code for what stands in the other line.
    assert fix_encoding_errors("el señor Ñáñez\ninformaci√≥n, ni√±o") == "el señor Ñáñez\ninformación, niño"


@pytest.mark.parametrize("sign", ["\0", "\x07", "\x1b", "\x7f", "\x81", "\ufffd", "\ufeff"], ids=ascii)
def test_signs_that_nobody_means_are_broken(sign: str) -> None:
    assert broken_encoding(f"a text {sign}with it")
    assert broken_encoding(f"un niño {sign}")


def test_byte_order_marks_are_taken_out_and_what_is_lost_is_left() -> None:
    assert fix_encoding_errors("\ufeffel niño\ufeff") == "el niño"
    assert fix_encoding_errors("a\ufffdb\x00c é") == "a\ufffdb\x00c é"
