"""What the quality rooms find in real rows, against plain loops over the files and what is known of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash
from numpy.typing import NDArray
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from packhorse.data.checks.contamination import EvaluationIndex
from packhorse.data.checks.duplicates import equal_groups, near_groups
from packhorse.data.checks.encoding import broken_encoding, fix_encoding_errors
from packhorse.data.checks.language import languages
from packhorse.data.checks.personal import find_personal
from packhorse.data.checks.words import signatures


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of the lines that are JSON."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def first_cells(path: Path) -> list[str]:
    return [line.split("\t")[0] for line in path.read_text(encoding="utf-8").split("\n") if line]


def xquad(path: Path) -> list[tuple[str, str]]:
    paragraphs = [
        part for article in json.loads(path.read_text(encoding="utf-8"))["data"] for part in article["paragraphs"]
    ]
    return [(part["context"], asked["question"]) for part in paragraphs for asked in part["qas"]]


def dpo(path: Path) -> list[str]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        "\n".join([*(turn["value"] for turn in row["conversations"]), row["chosen"]["value"], row["rejected"]["value"]])
        for row in rows
    ]


def texts_of(data: Path, name: str) -> list[str]:
    """The rows of a real file as texts, read without any of our readers."""
    readers = {
        "glaive": lambda: [
            "\n".join(turn["value"] for turn in row["conversations"])
            for row in json.loads((data / "lf_glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
        ],
        "dpo": lambda: dpo(data / "lf_dpo_en_demo.json"),
        "kto": lambda: [
            "\n".join(turn["content"] for turn in row["messages"])
            for row in json.loads((data / "lf_kto_en_demo.json").read_text(encoding="utf-8"))
        ],
        "c4": lambda: [row["text"] for row in lines(data / "lf_c4_demo.jsonl")],
        "alpaca": lambda: [
            "\n".join(row.get(key, "") for key in ("instruction", "input", "output"))
            for row in lines(data / "alpaca_libre_v2.jsonl")
        ],
        "gsm8k train": lambda: [f"{row['question']}\n{row['answer']}" for row in lines(data / "gsm8k_train.jsonl")],
        "gsm8k test": lambda: [f"{row['question']}\n{row['answer']}" for row in lines(data / "gsm8k_test.jsonl")],
        "gsm8k test questions": lambda: [row["question"] for row in lines(data / "gsm8k_test.jsonl")],
        "banking train": lambda: [row["text"] for row in table(data / "banking77_train.csv")],
        "banking test": lambda: [row["text"] for row in table(data / "banking77_test.csv")],
        "xquad": lambda: ["\n".join(row) for row in xquad(data / "xquad_es.json")],
        "xquad questions": lambda: [question for _, question in xquad(data / "xquad_es.json")],
        "mgsm es": lambda: first_cells(data / "mgsm_es.tsv"),
        "mgsm en": lambda: first_cells(data / "mgsm_en.tsv"),
    }
    return readers[name]()


@pytest.fixture
def texts(shared: Path) -> Any:
    return lambda name: texts_of(shared / "data", name)


def keys_of(texts: list[str]) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def similar_pairs(texts: list[str]) -> dict[tuple[int, int], float]:
    """The exact Jaccard similarity of every pair with a shingle in common."""
    sets = [shingles(text) for text in texts]
    rows_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    common: Counter[tuple[int, int]] = Counter()
    for row, own in enumerate(sets):
        for shingle in own:
            common.update((other, row) for other in rows_with[shingle])
            rows_with[shingle].append(row)
    return {(one, two): num / (len(sets[one]) + len(sets[two]) - num) for (one, two), num in common.items()}


@pytest.mark.parametrize(
    ("threshold", "names"),
    [
        (0.8, ["glaive", "dpo", "alpaca", "xquad", "banking test"]),
        (0.5, ["glaive", "alpaca", "xquad questions", "banking test"]),
    ],
    ids=["0.8", "0.5"],
)
def test_near_copies_are_those_of_all_pairs(texts: Any, threshold: float, names: list[str]) -> None:
    rows = [text for name in names for text in texts(name)]
    similarity = similar_pairs(rows)
    labels = near_groups(signatures(rows), keys_of(rows), threshold).labels
    clear = [pair for pair, jaccard in similarity.items() if jaccard >= threshold + 0.1]
    assert len(clear) > 150
    assert np.mean([labels[one] == labels[two] for one, two in clear]) >= 0.95
    # Each row of a group is near another of it; the estimate errs by .05 at most once in a while.
    nearest: dict[int, float] = defaultdict(float)
    for (one, two), jaccard in similarity.items():
        if labels[one] == labels[two]:
            nearest[one], nearest[two] = max(nearest[one], jaccard), max(nearest[two], jaccard)
    grouped = [row for row, count in enumerate(np.bincount(labels, minlength=len(rows))[labels]) if count > 1]
    assert np.mean([nearest[row] >= threshold - 0.1 for row in grouped]) >= 0.95


@pytest.mark.parametrize(
    ("name", "copies"), [("dpo", 5), ("xquad questions", 5), ("gsm8k train", 0), ("banking train", 0), ("alpaca", 3)]
)
def test_exact_copies_are_those_of_a_set(texts: Any, name: str, copies: int) -> None:
    rows = texts(name)
    assert len(rows) - len(set(rows)) == copies
    assert len(rows) - len(np.unique(equal_groups(keys_of(rows)))) == copies


def test_estimates_are_those_of_datasketch(texts: Any) -> None:
    rows = texts("xquad")[:300]
    pairs = [(at, at + step) for at in range(290) for step in (1, 2, 3)]
    exact = similar_pairs(rows)
    peers = []
    for row in rows:
        peer = MinHash(num_perm=64, seed=1)
        peer.update_batch([" ".join(shingle).encode() for shingle in shingles(row)])
        peers.append(peer)
    ours = signatures(rows)
    truth = np.array([exact.get(pair, 0.0) for pair in pairs])
    our_errors = np.array([(ours[one] == ours[two]).mean() for one, two in pairs]) - truth
    peer_errors = np.array([peers[one].jaccard(peers[two]) for one, two in pairs]) - truth
    assert np.std(our_errors) <= 1.1 * np.std(peer_errors)
    assert abs(our_errors.mean()) < 0.02


def test_questions_about_one_passage_are_alike_but_no_copies(texts: Any, shared: Path) -> None:
    rows = texts("xquad")
    keys = keys_of(rows)
    groups = near_groups(signatures(rows), keys, 0.8)
    copies = near_groups(signatures(rows), keys, 0.8, signatures(texts("xquad questions")))
    assert len(rows) - len(np.unique(groups.labels)) > 800
    assert len(rows) - len(np.unique(copies.labels)) < 15
    assert groups.frames == ()


@pytest.mark.parametrize(
    ("name", "code", "right", "wrong"),
    [
        ("mgsm es", "es", 1.0, 0.0),
        ("mgsm en", "en", 1.0, 0.0),
        ("xquad", "es", 0.99, 0.0),
        ("xquad questions", "es", 0.95, 0.001),
        ("banking train", "en", 0.975, 0.001),
        ("gsm8k test", "en", 0.999, 0.0),
    ],
)
def test_languages_of_real_rows(texts: Any, name: str, code: str, right: float, wrong: float) -> None:
    found = Counter(languages(texts(name)))
    assert found[code] >= right * found.total()
    assert found.total() - found[code] - found["und"] <= wrong * found.total()


def test_languages_are_those_of_the_library(texts: Any) -> None:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    names = ["kto", "c4", "mgsm es", "xquad questions", "dpo"]
    rows = [text[:300].strip() for name in names for text in texts(name)]
    rows += [text.upper() for text in rows[:50]] + [text[at:] for at, text in enumerate(rows[:200])]
    expected = []
    for row in rows:
        code, probability = identifier.classify(row)
        expected.append(code if probability >= 0.5 and len(row.encode()) >= 10 and code != "zxx" else "und")
    assert languages(rows) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize(
    ("name", "broken", "mended"),
    [
        pytest.param("mgsm es", 0, 0, id="Spanish"),
        pytest.param("xquad", 19, 19, id="Spanish with byte order marks"),
        pytest.param("gsm8k train", 0, 0, id="English"),
        pytest.param("kto", 2, 2, id="FranÃ§oise"),
        pytest.param("dpo", 2, 2, id="fiancÃ©"),
        pytest.param("c4", 5, 1, id="U+FFFD"),
    ],
)
def test_broken_encoding_in_real_rows(texts: Any, name: str, broken: int, mended: int) -> None:
    rows = texts(name)
    assert sum(map(broken_encoding, rows)) == broken
    changed = [(row, fix_encoding_errors(row)) for row in rows if fix_encoding_errors(row) != row]
    assert len(changed) == mended
    assert not any(sign in after for _, after in changed for sign in ("Ã", "\ufeff"))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gsm8k train", {}),
        ("banking train", {}),
        ("xquad", {}),
        ("mgsm es", {}),
        ("kto", {}),
        ("dpo", {}),
        ("glaive", {"email": 9}),
        ("alpaca", {"phone": 1, "email": 1}),
        ("c4", {"email": 7, "phone": 4}),
    ],
)
def test_personal_data_in_real_rows(texts: Any, name: str, kinds: dict[str, int]) -> None:
    # Each of these was looked at: all are what they are said to be, by their form.
    found = Counter(kind for row in texts(name) for kind in {kind for kind, _, _ in find_personal(row)})
    assert found == kinds


def test_mgsm_is_found_in_gsm8k_test_and_not_in_train(texts: Any) -> None:
    asked = texts("mgsm en")
    assert sum(EvaluationIndex(asked, 13).hits(texts("gsm8k test"))) == 250
    assert all(EvaluationIndex(texts("gsm8k test"), 13).hits(asked))
    assert sum(EvaluationIndex(asked, 13).hits(texts("gsm8k train"))) == 0
    assert not any(EvaluationIndex(asked, 13).hits(texts("mgsm es")))


def test_few_questions_of_gsm8k_train_repeat_the_test(texts: Any) -> None:
    rows = texts("gsm8k train")
    hits = EvaluationIndex(texts("gsm8k test questions"), 13).hits(rows)
    assert sum(hits) == 4
    assert any("A train travels 270 miles in 3 hours" in row for row, hit in zip(rows, hits) if hit)
