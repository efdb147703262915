"""Predicted and published speed: every published figure, with the reason of each gap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.search.scaling import scale
from packhorse.estimate.speed import PUBLISHED, SpeedEstimate
from packhorse.model_spec.configuration import find_configuration, published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe

PAGE = Path(__file__).parents[3] / "docs" / "speed.md"
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_2_70B = {**LLAMA_2_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_2_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8}
MODELS = {
    "3B": published()["meta-llama/Llama-3.2-3B"],
    "8B": published()["meta-llama/Llama-3.1-8B"],
    "70B": published()["meta-llama/Llama-3.1-70B"],
    "Llama 2 7B": LLAMA_2_7B,
    "Llama 2 70B": LLAMA_2_70B,
}
LORA = {"kind": "lora", "rank": 16, "dropout": 0.0}
QLORA = {**LORA, "kind": "qlora"}
IN_BACKWARD = {"name": "paged_adamw_8bit", "in_backward": True, "clip_norm": None}


@dataclass(frozen=True)
class Row:
    """A published run as a recipe; what the source does not state is set as its run must have had it."""

    name: str
    tokens_per_second: float
    gpu: str
    model: str
    method: Any
    length: int
    micro: int = 1
    count: int = 1
    engine: str = "single"
    checkpointing: Any = False
    packs: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    other_gpu: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    reason: str = ""

    def estimate(self) -> SpeedEstimate:
        recipe = Recipe.model_validate(
            {
                "name": "published",
                "model": {"config": dict(MODELS[self.model])},
                "method": self.method,
                "data": {"sources": [{"path": "rows.jsonl"}]},
                "batch": {"length": self.length, "packs": self.packs or self.micro * self.count, "micro": self.micro},
                "optimizer": {"learning_rate": 1e-4, **self.optimizer},
                "steps": 100,
                "parallel": {"engine": self.engine, "checkpointing": self.checkpointing, "compile": self.compiled},
            }
        )
        plan = make_plan(recipe, DeviceRequest(self.count), Hardware(2, ()), None)
        shape = read_shape(recipe.model.config)
        assert shape is not None
        gpu = find_gpu(self.gpu).model_copy(update=self.other_gpu)
        return PlanEstimate(plan, EstimateInputs(shape, PackFigures.full(self.length), gpu)).speed


LIMITED = "H100 limited to 500 of 700 W; selective checkpointing is predicted as every second layer"
TITAN = {"bandwidth_gb": 2400.0}
SHARDED: dict[str, Any] = {"engine": "fsdp2", "checkpointing": True}
A100 = {"gpu": "A100-80GB", "model": "3B", "length": 4096, "micro": 2}
ROWS = [
    Row(
        "8B LoRA, NeMo AutoModel", 12_473, "H100", "8B", LORA, 4096, packs=32,
        reason="fused kernels for LoRA and norms",
    ),
    Row(
        "8B full, torchtitan, eager", 5_762, "H100", "8B", "full", 8192, micro=2, count=8,
        engine="fsdp2", checkpointing=2, other_gpu=TITAN,
        reason=LIMITED,
    ),
    Row(
        "8B full, torchtitan, compiled", 6_667, "H100", "8B", "full", 8192, micro=2, count=8,
        engine="fsdp2", checkpointing=2, other_gpu=TITAN, compiled=True, reason=LIMITED,
    ),
    Row("70B LoRA, NeMo AutoModel", 1_092, "H100", "70B", LORA, 4096, count=8, packs=32, **SHARDED),
    Row("70B LoRA, torchtune", 437, "A100-80GB", "70B", LORA, 2048, micro=2, count=8, **SHARDED),
    Row(
        "70B full, torchtune, offloaded", 196, "A100-80GB", "70B", "full", 2048, micro=2, count=8,
        engine="zero3_offload", checkpointing=True,
        reason="AdamW updates bfloat16 weights on the host, in Packhorse float32 ones; the host's speed is assumed",
    ),
    Row(
        "70B QLoRA, fsdp_qlora", 786, "H100", "Llama 2 70B", QLORA, 2048, micro=8, count=4, **SHARDED,
        reason="with software of early 2024 the H100 was 1.9 times as fast as the A100; its products are 2.9 times",
    ),
    Row("70B QLoRA, fsdp_qlora", 390, "A100-40GB", "Llama 2 70B", QLORA, 2048, micro=4, count=8, **SHARDED),
    Row("70B QLoRA, fsdp_qlora", 414, "A100-40GB", "Llama 2 70B", QLORA, 2048, micro=4, count=4, **SHARDED),
    Row("8B full, torchtune", 1_650, "4090", "8B", "full", 2048, 2, checkpointing=True, optimizer=IN_BACKWARD),
    Row(
        "8B LoRA, torchtune", 3_083, "4090", "8B", LORA, 2048, micro=2, checkpointing=True,
        compiled=True, reason="the 72 MB cache of a 4090 holds part of what the prediction sends through its memory",
    ),
    Row("8B QLoRA, torchtune", 2_413, "4090", "8B", QLORA, 2048, micro=2, checkpointing=True, compiled=True),
    Row("3B full, torchtune, packed", 7_075, method="full", **A100),
    Row("3B full, + compile", 8_998, method="full", **A100, compiled=True),
    Row("3B full, + chunked loss", 9_174, method="full", **A100, compiled=True),
    Row("3B full, + checkpointing", 7_210, method="full", **A100, checkpointing=True, compiled=True),
    Row(
        "3B full, + 8-bit Adam", 6_960, method="full", **A100,
        checkpointing=True, optimizer={"name": "adamw_8bit"}, compiled=True,
    ),
    Row("3B LoRA, torchtune", 8_210, method=LORA, **A100, checkpointing=True, compiled=True),
    Row("3B QLoRA, torchtune", 8_035, method=QLORA, **A100, checkpointing=True, compiled=True),
    Row(
        "7B LoRA DDP, fsdp_qlora", 2_400, "4090", "Llama 2 7B", LORA, 2048, micro=4, count=2,
        engine="ddp", checkpointing=True,
        reason="adapters in bfloat16; in Packhorse they are float32 under ddp",
    ),
    Row("7B LoRA FSDP, fsdp_qlora", 2_180, "4090", "Llama 2 7B", LORA, 2048, micro=6, count=2, **SHARDED),
    Row(
        "7B QLoRA DDP, fsdp_qlora", 2_330, "4090", "Llama 2 7B", QLORA, 2048, micro=8, count=2,
        engine="ddp", checkpointing=True,
        reason="adapters in bfloat16; in Packhorse they are float32 under ddp",
    ),
    Row(
        "7B LoRA DDP, fsdp_qlora", 1_190, "3090", "Llama 2 7B", LORA, 2048, micro=4, count=2,
        engine="ddp", checkpointing=True,
        reason="as on the 4090; limited to 280 of 350 W",
    ),
]  # fmt: skip
IDS = [f"{row.name}, {row.count} x {row.gpu}" for row in ROWS]


def gap(row: Row) -> float:
    return row.estimate().tokens_per_second_per_gpu / row.tokens_per_second - 1


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_predicted_and_published(row: Row) -> None:
    assert abs(gap(row)) < 0.46
    assert bool(row.reason) == (abs(gap(row)) > 0.10)


@pytest.mark.parametrize(
    ("eager", "compiled"),
    [
        ("3B full, torchtune, packed", "3B full, + compile"),
        ("8B full, torchtitan, eager", "8B full, torchtitan, compiled"),
    ],
    ids=["torchtune", "torchtitan"],
)
def test_compiling_gains_what_it_gained_them(eager: str, compiled: str) -> None:
    """Their limits of power and memory are the same in both runs: 27 % and 16 % are the gain alone."""
    before, after = (next(row for row in ROWS if row.name == name) for name in (eager, compiled))
    gain = after.estimate().tokens_per_second_per_gpu / before.estimate().tokens_per_second_per_gpu
    assert gain == pytest.approx(after.tokens_per_second / before.tokens_per_second, abs=0.10)


def test_three_quarters_are_within_the_stated_uncertainty() -> None:
    within = [abs(gap(row)) <= PUBLISHED for row in ROWS]
    assert sum(within) / len(within) >= 0.75
    assert median(abs(gap(row)) for row in ROWS) <= 0.10
    assert median(gap(row) for row in ROWS) < 0  # rather too slow than too fast


def test_the_order_of_the_3b_ladder_is_theirs() -> None:
    """Checkpointing costs; 8-bit Adam and adapters cost little in addition; QLoRA is a little slower than LoRA."""
    speed = {row.name: row.estimate().tokens_per_second_per_gpu for row in ROWS if row.model == "3B"}
    assert speed["3B full, + checkpointing"] < 0.85 * speed["3B full, + chunked loss"]
    assert 0.95 < speed["3B QLoRA, torchtune"] / speed["3B LoRA, torchtune"] < 1


@pytest.mark.parametrize(
    ("name", "method", "limit"),
    [("8B", "full", 20_500), ("8B", "lora", 29_800), ("70B", "full", 2_284), ("70B", "lora", 3_363)],
)
def test_no_prediction_passes_the_limit_of_the_hardware(name: str, method: str, limit: float) -> None:
    kind = {"kind": "lora", "rank": 1, "dropout": 0.0} if method == "lora" else method
    estimate = Row("", 0, "H100", name, kind, 4096).estimate()
    assert estimate.tokens_per_second_per_gpu / estimate.mfu == pytest.approx(limit, rel=0.01)
    assert estimate.mfu < estimate.hfu < 0.7


def test_a_7b_under_fsdp_loses_what_it_lost_on_2048_gpus() -> None:
    """Fernandez et al. 2024 (arXiv 2411.13055): 37 % fewer tokens a GPU on 2,048 H100 than on 128, MFU .41 of them."""
    few, many = (
        Row("", 0, "H100", "Llama 2 7B", "full", 4096, micro=2, count=count, engine="fsdp2").estimate()
        for count in (128, 2048)
    )
    assert many.tokens_per_second_per_gpu / few.tokens_per_second_per_gpu == pytest.approx(0.63, abs=0.04)
    assert few.mfu == pytest.approx(0.41, abs=0.05)


def test_the_table_of_the_documentation_is_this() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for row in ROWS:
        assert table_line(row) in lines


def table_line(row: Row) -> str:
    speed = row.estimate().tokens_per_second_per_gpu
    figures = f"{row.tokens_per_second:,.0f} | {round(speed, -1 if speed > 2000 else 0):,.0f} | {gap(row):+.0%}"
    return f"| {row.name} | {row.count} × {row.gpu} | {figures} | {row.reason} |"


SCALED: dict[str, tuple[str, list[str]]] = {
    "LoRA, zero3": ("llama3.3-70b/lora", []),
    "LoRA, fsdp2": ("llama3.3-70b/lora", ["parallel.engine=fsdp2"]),
    "QLoRA, fsdp2": ("llama3.3-70b/qlora", []),
    "full, zero3": ("llama3.3-70b/lora", ["method=full"]),
    "full, fsdp2": ("llama3.3-70b/lora", ["method=full", "parallel.engine=fsdp2"]),
    "full, hsdp": ("llama3.3-70b/lora", ["method=full", "parallel.engine=hsdp"]),
}


def scaling_line(name: str) -> str:
    recipe = load_recipe(*SCALED[name], check_environment=False)
    shape = read_shape(find_configuration(recipe))
    assert shape is not None
    counts = (8, 64, 256, 512, 1024, 2048, 4096)
    basis = EstimateInputs(shape, PackFigures.full(recipe.batch.length), find_gpu("H100"))
    found = scale(recipe, basis, "weak", counts)
    speeds = [point.estimate.tokens_per_second_per_gpu for point in found.points if point.estimate is not None]
    end = f"{found.stopped_at:,}: {found.stopped_by}" if found.stopped_at else "beyond 4,096"
    return f"| {name} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} | {end} |"


@pytest.mark.parametrize("name", SCALED)
def test_the_scaling_table_of_the_documentation_is_this(name: str) -> None:
    assert scaling_line(name) in PAGE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print("\n".join([*map(table_line, ROWS), *map(scaling_line, SCALED)]))
