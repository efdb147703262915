"""Metrics of answers beside sacrebleu, rouge-score and scikit-learn; Spanish and Chinese by hand."""

import math
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import precision_recall_fscore_support

from packhorse.errors import UserError
from packhorse.evaluate.metrics.choose import METRICS, kinds_of, metrics_for, own_metric
from packhorse.evaluate.metrics.labels import (
    answered_labels,
    classification,
    confusion_matrix,
    f1_sums,
    labels_of,
    macro_f1,
    weighted_f1,
)
from packhorse.evaluate.metrics.metric import Expected, Reply
from packhorse.evaluate.metrics.number import final_number
from packhorse.evaluate.metrics.structure import tool_calls
from packhorse.evaluate.metrics.text import bleu, chrf, is_exact, normalised, rouge_l, signature, token_f1, words
from packhorse.recipe.rules import evaluation as rules

ENGLISH = ["the", "a", "cat", "dog", "sat", "on", "mat", "3", "times", ",", ".", "don't", "Up"]


def sentences(count):
    generator = random.Random(0)
    for _ in range(count):
        yield (" ".join(generator.choices(ENGLISH, k=generator.randint(1, 14))) for _ in range(2))


def value(name, expected, answer, ended=True, calls=False):
    return METRICS[name].score(Expected(expected, calls), Reply(answer, ended))


@pytest.mark.parametrize(
    ("expected", "answer", "same"),
    [("3 km", " 3 km\n", True), ("3 km", "3 Km", False), ("3 km", "3  km", False), ("é", "e\u0301", False)],
)
def test_exact_match_is_equality_but_for_the_ends(expected, answer, same):
    assert is_exact(expected, answer) is same


def test_metrics_of_text_are_those_of_the_libraries():
    rouge = RougeScorer(["rougeL"])
    for expected, answer in sentences(200):
        assert rouge_l(expected, answer) == pytest.approx(rouge.score(expected, answer)["rougeL"].fmeasure)
        assert chrf(expected, answer) == pytest.approx(sacrebleu.sentence_chrf(answer, [expected]).score)
        wanted = sacrebleu.sentence_bleu(answer, [expected], tokenize="intl", use_effective_order=True).score
        assert bleu(expected, answer) == pytest.approx(wanted)
    assert "version:" in signature("chrf")
    assert signature("token_f1") is None


def test_words_of_other_languages_count():
    # rouge-score keeps a-z and 0-9 and gives 0 for the first two.
    assert rouge_l("你好 世界", "你好世界") == 1.0
    assert words("我爱猫") == ["我", "爱", "猫"]
    assert token_f1("我爱猫", "我爱狗") == pytest.approx(2 / 3)
    assert words("El niño comió piña") == ["el", "niño", "comió", "piña"]
    assert token_f1("El niño comió", "el niño come") == pytest.approx(2 / 3)
    assert rouge_l("uno dos tres cuatro", "dos cuatro uno") == pytest.approx(2 * 2 / 7)
    assert normalised(" ¿El NIÑO? ") == "el niño"
    assert value("normalised_match", "Straße 5.", "STRASSE 5") == 1
    assert value("normalised_match", "-3.5", "3 5") == 0
    assert token_f1("", "") == 1
    assert token_f1("a", "") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("she has 3 and 4, so #### 1,234.50", "1234.50"),
        (r"thus \boxed{-3} as said in 2 steps", "-3"),
        ("The answer is 5. I am 99 % sure", "5"),
        ("3 + 4 = 7", "7"),
        ("The answer is 3. Wait: the answer is 4, not 5", "4"),
        ("−2,5", "5"),
        ("1e-3", "0.001"),
        ("none", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    found = final_number(text)
    assert found is None if number is None else float(found) == float(number)


def test_numbers_are_compared_and_not_their_texts():
    assert value("number", "#### 1000", "so it is 1,000.0") == 1
    assert value("number", "#### 1000", "so it is 1,000.1") == 0
    assert value("number", "#### 1000", "1000 and on and", ended=False) == 0
    assert math.isnan(value("number", "In 1999 the 3 cats slept well", "3"))
    assert value("number_found", "42 km", "no idea") == 0


def test_json_is_compared_by_its_fields():
    expected = '{"name": "Ann", "age": 3, "tags": ["a", "b"]}'
    assert value("json_fields", expected, '```json\n{"age": 3.0, "name": "Ann", "tags": ["a", "b"]}\n```') == 1
    assert value("json_fields", expected, '{"name": "Ann", "age": 4, "tags": ["a"], "more": 1}') == pytest.approx(2 / 5)
    assert value("json_valid", expected, '{"name": NaN}') == 0
    assert value("json_valid", expected, "{}") == 1
    assert math.isnan(value("json_valid", "plain", "{}"))


def test_tool_calls_are_read_in_the_form_of_each_template():
    wanted = [("price", {"of": "fig", "n": 2})]
    for text in (
        '<tool_call>\n{"name": "price", "arguments": {"of": "fig", "n": 2}}\n</tool_call>',
        '{"name": "price", "parameters": {"of": "fig", "n": 2}}',
        '[TOOL_CALLS] [{"name": "price", "arguments": {"of": "fig", "n": 2}}]',
        '{"type": "function", "function": {"name": "price", "arguments": "{\\"of\\": \\"fig\\", \\"n\\": 2}"}}',
    ):
        assert tool_calls(text) == wanted
        assert value("tool_arguments", text, text, calls=True) == 1
    expected = '{"name": "price", "parameters": {"of": "fig", "n": 2}}'
    answer = '{"name": "price", "parameters": {"of": "fig", "n": 3}}'
    assert value("tool_names", expected, answer, calls=True) == 1
    assert value("tool_arguments", expected, answer, calls=True) == pytest.approx(0.5)
    assert value("tool_names", expected, "I do not know", calls=True) == 0


def test_classification_is_that_of_scikit_learn():
    generator = random.Random(1)
    labels = ("spam", "ham", "news")
    truth = generator.choices(labels, (6, 3, 1), k=300)
    given = [text if generator.random() < 0.7 else generator.choice([*labels, "what?"]) for text in truth]
    expected, replies = np.array([labels.index(text) for text in truth]), [Reply(text.upper(), True) for text in given]
    found = classification(confusion_matrix(labels, expected, replies))
    sums = f1_sums(expected, answered_labels(labels, replies), len(labels)).sum(0)
    assert (macro_f1(sums), weighted_f1(sums)) == pytest.approx((found.macro_f1, found.weighted_f1))
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, given, labels=labels, average=average, zero_division=0
        )
        assert getattr(found, f"{average}_f1") == pytest.approx(f1)
        if average == "macro":
            assert (found.macro_precision, found.macro_recall) == pytest.approx((precision, recall))
    assert found.accuracy == pytest.approx(np.mean([a == b for a, b in zip(truth, given)]))
    # An answer that does not end is no label.
    assert confusion_matrix(labels, [0], [Reply("spam", False)])[0].tolist() == [0, 0, 0, 1]


def test_metrics_are_chosen_by_the_kind_of_answers():
    def of(*texts):
        return [Expected(text) for text in texts]

    assert labels_of(["yes", "No", "no", "yes"] * 5) == ("yes", "no")
    assert labels_of(["a", "b", "c", "d"]) is None
    assert kinds_of(of(*["yes", "no"] * 10)) == ["label"]
    assert kinds_of(of("#### 3", '{"a": 1}', "A long answer in words")) == ["json", "number", "text"]
    assert [metric.name for metric in metrics_for(of("#### 3"), None)] == [
        "exact_match",
        "number",
        "number_found",
        "stopped",
    ]
    assert [metric.name for metric in metrics_for(of("x"), ["bleu"])] == ["bleu"]
    assert metrics_for([], None) == []


def test_a_recipe_may_name_just_these_metrics():
    assert sorted(METRICS) == list(rules.METRICS)


def test_a_function_of_the_user_is_a_metric(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(row, answer):\n    return len(row['prompt']) if answer else None\n")
    metric = own_metric(f"{file}:score")
    assert metric.score(Expected("x", row={"prompt": [1, 2]}), Reply("y", True)) == 2
    assert math.isnan(metric.score(Expected("x", row={"prompt": []}), Reply("", True)))
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="nothing_of_this_name"):
        own_metric(f"{file}:score")
