"""What went wrong on one rank, known to all: so that all do the same about it."""

from __future__ import annotations

import json

from packhorse.errors import UserError
from packhorse.train.engine.engine import Engine
from packhorse.train.ranks.texts import texts_of_ranks

LONGEST_REPR = 1000


def agreed_failure(engine: Engine, error: Exception | None) -> Exception | None:
    """Tells all ranks what this one met; a collective.

    Args:
        engine: Its ranks.
        error: Of this rank; None where nothing went wrong here.

    Returns:
        None where nothing went wrong anywhere; else, on every rank, the user error of the lowest rank that has one.
        Of a bug, its own exception where it happened, and a RuntimeError that tells of it elsewhere.
    """
    if not engine.sum_over_ranks([float(error is not None)])[0]:
        return None
    said = next(filter(None, texts_of_ranks(engine, _in_words(error))))
    if error is not None and not isinstance(error, UserError):
        return error  # its traceback is here
    words = json.loads(said)
    if "bug" in words:
        return RuntimeError(f"another rank failed: {words['bug']}")
    fact, why, fix = words["mistake"]
    return UserError(fact, why, fix, exit_code=words["exit_code"])


def _in_words(error: Exception | None) -> str:
    if error is None:
        return ""
    if not isinstance(error, UserError):
        return json.dumps({"bug": repr(error)[:LONGEST_REPR]})
    mistake = error.mistakes[0]
    return json.dumps({"mistake": [mistake.fact, mistake.why, mistake.fix], "exit_code": error.exit_code})
