"""Estimate the price of training on a file at a hosted service, from a table that comes with Packhorse."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

TABLE: Final = Path(__file__).parent / "convert_prices.yaml"
BYTES_PER_TOKEN: Final = 4
TOKENS_PER_MESSAGE: Final = 3
TOKENS_PER_EXAMPLE: Final = 3
RULE: Final = (
    f"UTF-8 bytes ÷ {BYTES_PER_TOKEN}, plus {TOKENS_PER_MESSAGE} per message and {TOKENS_PER_EXAMPLE} per example"
)


@dataclass(frozen=True)
class ModelPrice:
    """Price of one model.

    Attributes:
        name: Name of the model at the service.
        dollars_per_million_tokens: Price of a million training tokens.
        most_tokens: Length in tokens to which the service cuts longer examples.
    """

    name: str
    dollars_per_million_tokens: float
    most_tokens: int


@dataclass(frozen=True)
class PriceTable:
    """Contents of `convert_prices.yaml`.

    Attributes:
        date: Month in which the prices were looked up.
        source: Where they were looked up, in words.
        notice: Statement of the service about its offer.
        models: Prices by model.
    """

    date: str
    source: str
    notice: str
    models: tuple[ModelPrice, ...]


@dataclass
class TokenCount:
    """Running estimate of a file's tokens.

    Attributes:
        num_examples: Rows so far.
        lengths: Number of rows of each estimated length in tokens.
    """

    num_examples: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row in OpenAI's form."""
        self.num_examples += 1
        self.lengths[estimated_tokens(row)] += 1

    def total(self, most_tokens: int | None = None) -> int:
        """Return the tokens of all rows, each cut to `most_tokens`."""
        cut = ((min(length, most_tokens or length), rows) for length, rows in self.lengths.items())
        return sum(length * rows for length, rows in cut)

    def num_longer(self, most_tokens: int) -> int:
        """Return the number of rows that are longer."""
        return sum(rows for length, rows in self.lengths.items() if length > most_tokens)


def read_prices() -> PriceTable:
    """Return the price table that comes with Packhorse."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    models = tuple(
        ModelPrice(row["name"], row["per_million_training_tokens"], row["max_tokens_per_example"])
        for row in table["models"]
    )
    return PriceTable(str(table["date"]), table["source"], table["notice"], models)


def estimated_tokens(row: dict[str, Any]) -> int:
    """Return the estimated tokens of a row in OpenAI's form, without the service's tokenizer.

    A token of English has about 4 bytes (real files of chats, sums, labels and tool calls came to .74 to 1.20 of the
    counts of two public tokenizers); the 3 tokens per message and per example are those of the cookbook's notebook
    «Data preparation and analysis for chat model fine-tuning».
    """
    messages = row["messages"]
    texts = [message["content"] or "" for message in messages]
    texts += [json.dumps(message["tool_calls"], ensure_ascii=False) for message in messages if "tool_calls" in message]
    texts += [json.dumps(row["tools"], ensure_ascii=False)] if "tools" in row else []
    in_text = sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts)
    return in_text + TOKENS_PER_MESSAGE * len(messages) + TOKENS_PER_EXAMPLE


def default_epochs(num_examples: int) -> int:
    """Return the service's default number of epochs for a file, by the notebook of `estimated_tokens`.

    The default is 3, limited so that examples × epochs are 100 to 25,000, and the epochs 1 to 25.
    """
    if num_examples * 3 < 100:
        return min(25, 100 // num_examples)
    return max(1, 25_000 // num_examples) if num_examples * 3 > 25_000 else 3
