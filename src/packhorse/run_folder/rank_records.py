"""rank-R.json: how each rank of an attempt ended; of one that was killed there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED

CONSEQUENCE = re.compile(r"[Cc]onnection|Broken pipe|ncclRemoteError|ncclSystemError|another rank failed")
"""What a rank says in a collective when another is gone, or has failed."""


def read_rank_records(logs: Path) -> list[dict[str, Any]]:
    """What the ranks of an attempt wrote when they ended, the first one first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in logs.glob("rank-*.json")]
    return sorted(records, key=lambda record: record["time"])


def ended_early(record: Mapping[str, Any]) -> bool:
    """Whether a rank ended out of order, alone for all it knew: the others may wait for it."""
    return record["exit_code"] not in (EXIT_OK, EXIT_STOPPED) or bool(record["message"])


def is_cause(record: Mapping[str, Any]) -> bool:
    """Whether a rank tells of itself, and not of what another one's end did to it."""
    last = record["message"].strip().splitlines()[-1:]
    return record["exit_code"] != EXIT_BUG or not any(CONSEQUENCE.search(line) for line in last)
