"""`packhorse tune` as typed: short runs through the launcher, compared, and removed."""

from __future__ import annotations

import json
from pathlib import Path

from cli import packhorse
from tiny import write_tiny


def test_candidates_are_trained_and_compared_and_leave_nothing(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    refused = "parallel.engine=zero2+optimizer.name=muon"
    words = ("--steps", "4", "--candidates", f"{refused},parallel.checkpointing=true", "--json")
    typed = packhorse(tmp_path, "tune", "tiny.yaml", *words)
    assert typed.code == 0, typed.err
    plain, not_possible, recomputed = json.loads(typed.out)["trials"]
    for trial in (plain, recomputed):
        assert len(trial["losses"]) == 4
        assert trial["tokens_per_second"] > 0
        assert trial["peak_bytes"] > 1e8
    # The same packs in float32, whatever is recomputed.
    assert recomputed["loss_difference"] < 1e-5
    assert not_possible["why_not"] == "optimizer.name is muon, and parallel.engine is zero2."
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith("tiny")] == []
