"""QLoRA: the 4-bit base stays as it is, the adapter alone is kept, and little is lost beside LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from laboratory import Laboratory
from launches import ENGINES, launch_by_hand, train_forked
from safetensors import safe_open

from cli import curve

WATCHED = Path(__file__).parent / "watched_worker.py"
HELD_OUT = ("steps=60", "data.split.train=0.9", "data.split.validation=0.1")
PROJECTIONS_OF_A_LAYER = 7
LAYERS = 5
# Dettmers et al. 2023 (arXiv 2305.14314), section 4: NF4 with double quantisation reaches LoRA beside 16-bit weights.
# A model of 260,000 weights has less to spare than theirs: 2 % of the held-out loss.
PUBLISHED_GAP = 0.02


@pytest.fixture(scope="module")
def qlora(laboratory: Laboratory) -> Path:
    """A run of two processes that shard the 4-bit weights, watched."""
    recipe = laboratory.recipe("nf4", "stories260K", "mixed")
    words = [recipe.name, "name=watched", "parallel.engine=fsdp2", "parallel.processes=2", *HELD_OUT]
    done = launch_by_hand(laboratory.folder, "watched", words, WATCHED)
    assert done.code == 0, done.err
    return laboratory.folder / "runs" / "watched"


def test_the_four_bit_base_is_untouched_bit_for_bit(qlora: Path) -> None:
    for rank in range(2):
        held = json.loads((qlora / f"frozen-{rank}.json").read_text(encoding="utf-8"))
        assert held["before"] == held["after"]
        quantized = [name for name in held["before"] if "absmax" in name and "nested" not in name]
        assert len(quantized) == PROJECTIONS_OF_A_LAYER * LAYERS
    losses = curve(qlora)
    assert losses[-1] < losses[0] - 1


def test_the_adapter_alone_is_kept(qlora: Path) -> None:
    kept = sorted(path.name for path in (qlora / "adapter").iterdir() if "token" not in path.name)
    assert [name for name in kept if not name.startswith(("chat_template", "README"))] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "result.json",
    ]
    assert not (qlora / "model").exists()
    assert not list(qlora.glob("checkpoints/*/model"))
    with safe_open(qlora / "adapter" / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
        sizes = [weights.get_slice(name).get_shape() for name in names]
    assert len(names) == 2 * PROJECTIONS_OF_A_LAYER * LAYERS
    # Rank 8 on q, o (64 x 64), k, v (32 x 64), gate, up and down (172 x 64) of 5 layers.
    of_a_layer = 8 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (172 + 64))
    assert sum(rows * columns for rows, columns in sizes) == LAYERS * of_a_layer


def test_little_is_lost_beside_lora(qlora: Path, laboratory: Laboratory) -> None:
    recipe = laboratory.recipe("lora", "stories260K", "mixed")
    beside = train_forked(recipe, ENGINES["single"], "lora", *HELD_OUT)
    lora, of_qlora = (curve(run, "evaluation/loss") for run in (beside, qlora))
    assert lora[-1] < lora[0] - 1
    assert of_qlora[-1] == pytest.approx(lora[-1], rel=PUBLISHED_GAP)
