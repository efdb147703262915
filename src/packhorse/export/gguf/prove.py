"""Prove a GGUF file: llama.cpp gives the ids of training to its texts, and the log-probabilities of transformers."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase

from packhorse.errors import UserError
from packhorse.export.gguf.convert import Source
from packhorse.export.gguf.llama_cpp import LlamaCpp
from packhorse.export.gguf.vocabulary import Vocabulary
from packhorse.export.reference import load_layers, log_probabilities

# What tokenizers differ in: runs of spaces, digits, marks that combine, scripts without spaces, emoji of several parts.
HARD_TEXTS: Final = (
    "",
    " ",
    "  two  spaces   three\t tabs\t\t",
    "\n\n\nlines\r\n\r\nof windows\n \n",
    "it's we'll I'D they'Ve don't",
    "1234567890 3.14159 1,000,000 ٣٤٥ १२३ Ⅳ ½",
    "¿Qué tal, niño? Ça va, Müller & Strauß – “so”…",
    "你好，世界！日本語のテキスト、한국어 텍스트",
    "Привет мир · שלום עולם · مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 a\u0308 \u200b\u200d \ufeff\u2028",
    'def f(x):\n\treturn x**2  # ok\n{"a": [1, 2.5e-3, null]}\n<html><b>&amp;</b></html>',
    "https://example.org/a?b=c&d=%20#e C:\\temp\\x.txt $x_{1}$ __init__ ~~~ ==== ----",
    "Supercalifragilisticexpialidocious" * 3,
    "\x00\x01\x7f control",
)
TOP: Final = 2000
"""Most of the vocabulary whose log-probabilities are compared."""
LEAST_LOG_PROBABILITY: Final = -9.2
"""ln 1e-4: rarer tokens never matter, and their logarithms are not exact."""
MAX_POSITIONS: Final = 48


@dataclass(frozen=True)
class Proof:
    """What was compared before a file of another type was written.

    Attributes:
        num_texts: Rendered rows and hard texts that were tokenised by llama.cpp.
        num_normalised: Texts that differ only because the tokenizer normalises them first, and llama.cpp does not.
        num_layers: Layers that were compared; all of a small model.
        num_positions: Positions whose next token's log-probabilities were compared, in fp32.
        largest_difference: Largest difference of a log-probability above 1e-4, nats.
        bound: Bound of it.
    """

    num_texts: int
    num_normalised: int
    num_layers: int
    num_positions: int
    largest_difference: float
    bound: float


def prove_tokens(llama: LlamaCpp, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, str]:
    """Compare the ids of texts.

    Returns:
        Number of texts that only differ by normalisation, and what differs in the first other one; empty if nothing.
    """
    normalised = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = llama.tokenize(text)
        if found == ids:
            continue
        if not unicodedata.is_normalized("NFC", text) and llama.tokenize(unicodedata.normalize("NFC", text)) == ids:
            normalised += 1
            continue
        at = next((n for n, (one, other) in enumerate(zip(found, ids)) if one != other), min(len(found), len(ids)))
        return normalised, f"{text[:60]!r} becomes {found[at : at + 4]} in llama.cpp and {ids[at : at + 4]} in training"
    return normalised, ""


def choose_vocabulary(
    candidates: Sequence[Vocabulary],
    write: Callable[[Vocabulary], Path],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> tuple[Vocabulary, int]:
    """Return the form of the tokenizer that gives every text its ids, and how many texts only normalisation changes.

    Args:
        candidates: Forms to try.
        write: Write a file with a form, and return its path.
        tokenizer: Tokenizer of training.
        texts: Rendered rows of the run.

    Raises:
        UserError: None of them does.
    """
    differences = []
    for vocabulary in candidates:
        with LlamaCpp(write(vocabulary), context=64) as llama:
            normalised, difference = prove_tokens(llama, tokenizer, [*texts, *HARD_TEXTS])
        if not difference:
            return vocabulary, normalised
        differences.append(difference)
    raise UserError(
        f"llama.cpp cuts texts into other tokens than training did: {differences[0]}.",
        "the model would read other tokens than it was trained on, and answer worse without any message.",
        "use the Hugging Face folder with transformers or vLLM: packhorse export RUN.",
    )


def prove_numbers(file: Path, source: Source, rows: Sequence[Sequence[int]], num_layers: int, bound: float) -> Proof:
    """Compare an f32 file of the first layers with transformers, on rows of the run.

    Args:
        file: The f32 file.
        source: Model that it was written from.
        rows: Ids of some rows.
        num_layers: Layers of the file.
        bound: Largest difference that is allowed, nats.

    Raises:
        UserError: A log-probability differs by more.
    """
    model = load_layers(source.folder, source.config, num_layers)
    largest, positions = 0.0, 0
    with LlamaCpp(file, context=max(map(len, rows)) + 1, exact=True) as llama:
        for ids in rows:
            expected = log_probabilities(model, ids)
            step = max(1, len(ids) * len(rows) // MAX_POSITIONS)
            for end in range(1, len(ids), step):
                found = llama.next_log_probabilities(ids[:end], min(TOP, expected.shape[-1]))
                here = expected[end - 1]
                gaps = [
                    abs(value - float(here[token]))
                    for token, value in found.items()
                    if here[token] > LEAST_LOG_PROBABILITY
                ]
                largest, positions = max(largest, *gaps), positions + 1
    if not largest <= bound:
        raise UserError(
            f"with fp32 weights, log-probabilities of llama.cpp and transformers differ by {largest:.2g} nats.",
            f"{bound:g} is what rounding explains; more means that a tensor or a parameter is read differently.",
            "use the Hugging Face folder: packhorse export RUN. Please report the model's config.json.",
        )
    return Proof(0, 0, num_layers, positions, largest, bound)
