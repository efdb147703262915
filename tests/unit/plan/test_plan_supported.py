"""Models that cannot be trained as they are, refused by the plan: what each does is transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from packhorse.errors import UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe


def plan_of(folder: Path, fields: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(fields))
    recipe = load_recipe("llama3.1-8b/lora", ["model.id=null", f"model.path={folder}"])
    make_plan(recipe, DeviceRequest(gpus=2), Hardware(num_cores=2, gpus=()), None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma2", "caps the scores"),
        ("gpt_oss", "attention sinks"),
        ("falcon", "attention interface"),
        ("cohere", "scales its logits"),
        ("gemma3", "vision_config: it reads more than text"),
        ("qwen2_audio", "audio_config"),
    ],
)
def test_an_architecture_that_would_be_trained_as_another(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, AutoConfig.for_model(kind).to_dict())


def test_a_loss_of_the_router_is_refused_and_without_it_planned(tmp_path: Path) -> None:
    fields = AutoConfig.for_model("mixtral").to_dict()
    assert fields["output_router_logits"] is False
    plan_of(tmp_path, fields)
    with pytest.raises(UserError, match="output_router_logits"):
        plan_of(tmp_path, {**fields, "output_router_logits": True})
