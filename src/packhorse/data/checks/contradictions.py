"""Rows that ask the same and answer differently: whichever is right, the other teaches its opposite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.keys import Keys, distinct_rows


def contradictions(prompts: Keys, answers: Keys) -> NDArray[np.bool_]:
    """Return bool [rows]: whether the row's prompt stands elsewhere with another answer.

    Nothing is normalised: an answer with another space in it counts. So does a second good answer to an open question.

    Args:
        prompts: uint64 [rows, 2] of `prompt_keys`.
        answers: uint64 [rows, 2] of `answer_keys`.
    """
    by_prompt, is_first = distinct_rows(prompts)
    group = np.cumsum(is_first) - 1
    ordered = answers[by_prompt]
    differs = (ordered != ordered[is_first][group]).any(axis=1)
    opposed = np.zeros(len(prompts), np.bool_)
    opposed[by_prompt] = (np.bincount(group, differs, len(prompts)) > 0)[group]
    return opposed
