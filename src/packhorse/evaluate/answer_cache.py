"""Answers that are kept on disk: an evaluation that was killed, or has a new metric, need not generate them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock


@dataclass(frozen=True)
class Answer:
    """Answer of a model to one prompt.

    Attributes:
        text: Text without special tokens.
        ended: Whether the model ended it with a stop token; otherwise it was cut at the limit.
    """

    text: str
    ended: bool


def answer_key(weights: str, prompt: Iterable[int], limit: int, stop_ids: Iterable[int]) -> str:
    """Return the key of an answer: a hash of all that decides it.

    Args:
        weights: Fingerprint of the model.
        prompt: Token ids.
        limit: Largest number of new tokens.
        stop_ids: Tokens that end an answer.
    """
    content = json.dumps([weights, list(prompt), limit, sorted(stop_ids)])
    return hashlib.sha256(content.encode()).hexdigest()


class AnswerCache:
    """Answers by key, in a file of one JSON object per line; without a file, nothing is kept. Threads may share it."""

    def __init__(self, file: Path | None = None, is_read_only: bool = False) -> None:
        self._file = None if is_read_only else file
        self._lock = Lock()
        self._answers: dict[str, Answer] = {}
        if file is not None and file.is_file():
            for line in file.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    self._answers[record["key"]] = Answer(record["text"], record["ended"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill has cut short

    def get(self, key: str) -> Answer | None:
        """Return the answer of a key; None if it is not known."""
        return self._answers.get(key)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; they are in the file when this returns."""
        self._answers |= answers
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"key": key, **asdict(answer)}) for key, answer in answers.items())
            with self._lock, self._file.open("a", encoding="utf-8") as file:
                # First a line end: the last line may have been cut short.
                file.write("\n" + "\n".join(lines) + "\n")
