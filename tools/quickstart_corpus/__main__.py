"""Write the quickstart's data into the package: `PYTHONPATH=tools python -m quickstart_corpus`, from the checkout."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Final

from quickstart_corpus.corpus import Row, core_rows, ticket_rows, to_jsonl
from quickstart_corpus.tokenizer import save_tokenizer, train_tokenizer

DATA: Final = Path(__file__).resolve().parents[2] / "src" / "packhorse" / "quickstart" / "data"


def corpus_texts() -> dict[str, str]:
    """Return the JSON lines of each file by name: both corpora, as chats and in Alpaca's columns."""
    corpora = {"core": core_rows(), "tickets": ticket_rows()}
    forms = {"messages": Row.as_messages, "alpaca": Row.as_alpaca}
    return {
        f"{source}.{form}.jsonl": to_jsonl(as_form(row) for row in rows)
        for source, rows in corpora.items()
        for form, as_form in forms.items()
    }


def tokenizer_texts() -> list[str]:
    """Return every turn of both corpora as the chat template writes it, role first."""
    rows = core_rows() + ticket_rows()
    return [f"{message['role']}\n{message['content']}" for row in rows for message in row.messages()]


def compressed(text: str) -> bytes:
    """Return the text as gzip without a time, so that equal texts give equal files."""
    return gzip.compress(text.encode(), mtime=0)


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer and write its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(tokenizer_texts()), folder)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for name, text in corpus_texts().items():
        (DATA / f"{name}.gz").write_bytes(compressed(text))
    write_tokenizer(DATA / "tokenizer")
