"""The quickstart, whole, and its three recipes' bars: real learning on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import packhorse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quickstart")
    done = packhorse(place, "quickstart", timeout=1800)
    assert done.code == 0, done.err
    assert "packhorse chat runs/quickstart-lora" in done.out
    return place


def exact_match(run: Path) -> dict[str, tuple[float, float]]:
    """Base and tuned share of exact answers, in percent, for each whole set."""
    lines = json.loads((run / "evaluation.json").read_text())["lines"]
    whole = [line for line in lines if line["group"] is None]
    return {line["set"]: (100 * line["base"]["exact_match"], 100 * line["tuned"]["exact_match"]) for line in whole}


def test_full_fine_tuning_goes_from_nothing_to_ninety_percent(folder: Path) -> None:
    base, tuned = exact_match(folder / "runs" / "quickstart-full")["validation"]
    assert base == 0
    assert tuned >= 90


def test_lora_learns_a_new_family_and_keeps_the_old_ones(folder: Path) -> None:
    found = exact_match(folder / "runs" / "quickstart-lora")
    assert found["validation"][0] <= 20
    assert found["validation"][1] >= 80
    assert found["retain"][1] >= found["retain"][0] - 5


def test_qlora_does_the_same_on_a_base_in_four_bits(folder: Path) -> None:
    done = packhorse(folder, "train", "quickstart/qlora", timeout=1200)
    assert done.code == 0, done.err
    assert packhorse(folder, "evaluate", "quickstart-qlora").code == 0
    found = exact_match(folder / "runs" / "quickstart-qlora")
    assert found["validation"][0] <= 20
    assert found["validation"][1] >= 80
    assert found["retain"][1] >= found["retain"][0] - 5


def test_the_quickstart_again_trains_nothing_anew(folder: Path) -> None:
    before = (folder / "runs" / "quickstart-full" / "plan.json").stat().st_mtime_ns
    done = packhorse(folder, "quickstart")
    assert done.code == 0
    assert "is trained already" in done.out
    assert (folder / "runs" / "quickstart-full" / "plan.json").stat().st_mtime_ns == before
