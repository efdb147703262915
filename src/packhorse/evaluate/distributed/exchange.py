"""Files between the command and the processes that it launches: what is to be measured, and what was measured.

Tokens, masks and prompts are one array each for all sets, end to end; other arrays hold their lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.evaluate.answer_cache import Answer
from packhorse.evaluate.measure import Measured, Work
from packhorse.evaluate.score import Documents, Loss
from packhorse.run_folder.layout import MEASURED_FILE, REQUEST_FILE, WORK_FILE

Array = NDArray[Any]


@dataclass(frozen=True)
class TokenRows:
    """Tokenised rows in memory.

    Attributes:
        ids: Token ids of each row, [length].
        supervised: 1 for a supervised token, of each row [length].
    """

    ids: Sequence[Array]
    supervised: Sequence[Array]

    @property
    def num_documents(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def document(self, index: int) -> tuple[Array, Array]:
        """Return ids [length] and supervised [length]."""
        return self.ids[index], self.supervised[index]


NO_ROWS: Final = TokenRows((), ())


@dataclass(frozen=True)
class MeasureRequest:
    """What the processes measure.

    Attributes:
        models: `base`, `tuned`, or a folder of weights -> fingerprint of the weights, part of the key of answers.
        tokenizer: Folder of the tokenizer; empty for that of the run.
        answers: File of known answers.
    """

    models: dict[str, str]
    tokenizer: str
    answers: str


def write_request(folder: Path, request: MeasureRequest, work: Sequence[Work]) -> None:
    """Write what is to be measured."""
    (folder / REQUEST_FILE).write_text(json.dumps(asdict(request)), encoding="utf-8")
    rows = [rows for each in work for rows in _scored(each)]
    documents = [each.document(row) for each in rows for row in range(each.num_documents)]
    prompts = [np.array(prompt, np.int64) for each in work for prompt in each.prompts]
    np.savez(
        folder / WORK_FILE,
        sizes=np.array([_sizes(each) for each in work], np.int64).reshape(-1, 4),
        ids=_joined([ids for ids, _ in documents]),
        supervised=_joined([mask for _, mask in documents]),
        lengths=np.array([len(ids) for ids, _ in documents], np.int64),
        prompts=_joined(prompts),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int64),
        limits=np.array([limit for each in work for limit in each.limits], np.int64),
    )


def _scored(work: Work) -> tuple[Documents, ...]:
    """Return what has losses, in the order of the files."""
    return work.documents, work.labels or NO_ROWS, work.rejected or NO_ROWS


def _sizes(work: Work) -> list[int]:
    return [*(rows.num_documents for rows in _scored(work)), len(work.prompts)]


def read_request(folder: Path) -> tuple[MeasureRequest, list[Work]]:
    """Read what is to be measured."""
    request = MeasureRequest(**json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8")))
    with np.load(folder / WORK_FILE, allow_pickle=False) as stored:
        ids, supervised = (_parts(stored[name], stored["lengths"]) for name in ("ids", "supervised"))
        prompts, limits = _parts(stored["prompts"], stored["prompt_lengths"]), stored["limits"].tolist()
        sizes = stored["sizes"].tolist()
    work, row, prompt = [], 0, 0
    for *counts, num_prompts in sizes:
        scored, asked = [], slice(prompt, prompt + num_prompts)
        for count in counts:
            scored.append(TokenRows(ids[row : row + count], supervised[row : row + count]))
            row += count
        documents, labels, rejected = scored
        chats = [each.tolist() for each in prompts[asked]]
        found = [each if each.num_documents else None for each in (labels, rejected)]
        work.append(Work(documents, chats, limits[asked], *found))
        prompt = asked.stop
    return request, work


def write_measured(folder: Path, measured: Mapping[str, Sequence[Measured]]) -> None:
    """Write the results of each model, one per set."""
    text = json.dumps({model: [asdict(each) for each in sets] for model, sets in measured.items()})
    (folder / MEASURED_FILE).write_text(text, encoding="utf-8")


def read_measured(folder: Path) -> dict[str, list[Measured]]:
    """Read the results of each model, one per set."""
    stored = json.loads((folder / MEASURED_FILE).read_text(encoding="utf-8"))
    return {
        model: [
            Measured(
                [Loss(**loss) for loss in each["losses"]],
                [Answer(**answer) for answer in each["answers"]],
                *(_losses(each[name]) for name in ("labels", "rejected")),
            )
            for each in sets
        ]
        for model, sets in stored.items()
    }


def _losses(stored: list[dict[str, Any]] | None) -> list[Loss] | None:
    return None if stored is None else [Loss(**loss) for loss in stored]


def _joined(rows: Sequence[Array]) -> Array:
    return np.concatenate([np.empty(0, np.int64), *rows]).astype(np.int64)


def _parts(joined: Array, lengths: Array) -> list[Array]:
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []
