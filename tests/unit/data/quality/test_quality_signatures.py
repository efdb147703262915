"""Do signatures estimate the share of common shingles, counted here with plain Python sets?"""

from __future__ import annotations

import random

import numpy as np
import pytest

from packhorse.data.checks.words import signatures

WORDS = "the a house river blue runs slowly under old bridge and three dogs sleep near it while rain".split()  # noqa: SIM905
JAPANESE = "今日は雨が降っているから家で静かに本を読んでいる"


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def jaccard(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def estimate(one: str, other: str) -> float:
    first, second = signatures([one, other])
    return float((first == second).mean())


def changed_pairs(num_pairs: int) -> list[tuple[str, str]]:
    draw = random.Random(3)
    pairs = []
    for _ in range(num_pairs):
        words = [draw.choice(WORDS) + str(draw.randrange(40)) for _ in range(draw.randrange(4, 120))]
        other = list(words)
        for _ in range(int(len(words) * draw.random() ** 3)):
            other[draw.randrange(len(words))] = draw.choice(WORDS)
        pairs.append((" ".join(words), " ".join(other)))
    return pairs


def test_estimates_are_those_of_sets() -> None:
    pairs = changed_pairs(1500)
    exact = np.array([jaccard(*pair) for pair in pairs])
    slots = signatures([text for pair in pairs for text in pair]).reshape(len(pairs), 2, -1)
    errors = (slots[:, 0] == slots[:, 1]).mean(axis=1) - exact
    assert abs(errors.mean()) < 0.005
    # 64 independent slots err by √(J (1 − J) ÷ 64), at most .0625.
    assert errors.std() < 0.055
    assert np.quantile(exact, 0.1) < 0.1
    assert np.quantile(exact, 0.9) > 0.8


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("The House  is\tblue\n", " the house is BLUE", id="case and space"),
        pytest.param("ÁRBOL y río", "árbol Y RÍO", id="case beyond ASCII"),
        pytest.param("a b c a b c a b c", "a b c a b c", id="a set counts once"),
        pytest.param("one or two conversations", "one or two conversations \t ", id="space after a long word"),
        pytest.param("", " \n", id="nothing"),
        pytest.param(f"{JAPANESE}\n{JAPANESE} ", JAPANESE + JAPANESE, id="a line break in Japanese"),
    ],
)  # fmt: skip
def test_equal_words_are_equal(one: str, other: str) -> None:
    assert estimate(one, other) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("yes", "no", id="one word"),
        pytest.param("a b", "a c", id="two words"),
        pytest.param("a b", "b a", id="order"),
        pytest.param("a b", "a b c", id="two words and three"),
        pytest.param("", "a", id="nothing and something"),
        pytest.param("abcdefgh", "abcdefghi", id="the ninth letter"),
        pytest.param("a" * 70 + " b c", "a" * 71 + " b c", id="length of long words"),
        pytest.param("x" * 40 + "1", "x" * 40 + "2", id="the end of a long word"),
        pytest.param("ab c d", "a bc d", id="borders of words"),
    ],
)
def test_other_words_are_other(one: str, other: str) -> None:
    assert estimate(one, other) < 0.2


def test_texts_without_spaces_are_compared_by_characters() -> None:
    one = "机器学习是人工智能的一个分支，它使用数据和算法来模仿人类学习的方式，逐步提高其准确性。"
    assert estimate(one, one.replace("人类", "我们")) > 0.6
    assert estimate(one, "今天的天气很好，我们去公园散步，然后在湖边的小餐馆吃了午饭，晚上早早地回家休息。") < 0.2


def test_addresses_are_no_text_without_spaces() -> None:
    one = "https://one.example/" + "abcdefghij" * 20
    assert estimate(one, one.replace("one", "two")) == 0


def test_a_row_does_not_hang_on_its_batch() -> None:
    texts = [text for pair in changed_pairs(30) for text in pair] + ["", "a", "机器学习是人工智能的一个分支它使用数据"]
    together = signatures(texts)
    assert (together == np.concatenate([signatures([text]) for text in texts])).all()
    assert (together.dtype, together.shape, signatures([]).shape) == (np.uint32, (len(texts), 64), (0, 64))
