"""`model.config`: its type, keys and numbers are checked with the recipe, against transformers' own classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from packhorse.errors import UserError
from packhorse.model_spec.parameters import FAMILIES
from packhorse.recipe.config_class import config_fields, model_types
from packhorse.recipe.load import load_recipe
from tiny import TINY, write_tiny

KINDS = (*FAMILIES, "gpt2", "olmo2", "qwen2_moe", "deepseek_v3", "phimoe", "gpt_oss", "stablelm")


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_read_from_source_text_are_those_of_the_class(kind: str) -> None:
    """The oracle is the class itself: every attribute of an instance, and nothing that it lacks."""
    fields, instance = config_fields(kind), AutoConfig.for_model(kind)
    assert fields is not None
    assert {name for name in vars(instance) if not name.startswith("_")} <= fields.keys()
    public = {name for name in fields if not name.startswith("_")}
    # gpt2 and others without rotary embeddings lack what the base class sets for those that have them.
    rotary = {"rope_theta", "rope_parameters", "rope_scaling", "original_max_position_embeddings"}
    assert {name for name in public if not hasattr(instance, name)} <= rotary
    assert "hiden_size" not in fields
    assert kind in model_types()


def config(**changes: Any) -> dict[str, Any]:
    return {"model": {**TINY["model"], "config": {**TINY["model"]["config"], **changes}}}


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "key": (config(hiden_size=64), "model.config.hiden_size is not a field of a llama", "`model.config.hidden_size`"),
    "type": (config(hidden_size="64"), "model.config.hidden_size is '64'; it takes a whole number", "hidden_size`"),
    "model type": (config(model_type="lama"), "model.config.model_type is 'lama'", "`model.config.model_type: llama`"),
    "encoder": (config(model_type="vit"), "model.config.model_type is 'vit'", "model.config.model_type: "),
    "zero": (config(num_hidden_layers=0), "model.config.num_hidden_layers is 0", "above 0"),
    "width": (
        config(hidden_size=34),
        "hidden_size is 34, which num_attention_heads 4",
        "model.config.hidden_size to 32",
    ),
    "groups": (config(num_key_value_heads=3), "num_key_value_heads is 3", "model.config.num_key_value_heads to 2"),
    "seed": ({"seed": -1}, "seed is -1; it takes a whole number from 0 to 4294967295", "write `seed: 0`"),
}


@pytest.mark.parametrize(("sections", "fact", "fix"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found_with_the_recipe(sections: dict[str, Any], fact: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(str(write_tiny(tmp_path, **sections)))
    (mistake,) = caught.value.mistakes
    assert mistake.fact.startswith(fact) or fact in mistake.fact
    assert fix in mistake.fix
    assert mistake.where.startswith(f"{tmp_path}/tiny.yaml:")


def test_values_that_the_class_takes_are_accepted(tmp_path: Path) -> None:
    loaded = load_recipe(str(write_tiny(tmp_path, **config(rope_theta=500000.0, head_dim=None, rms_norm_eps=1))))
    assert loaded.model.config is not None


def test_the_check_of_a_fresh_model_imports_no_transformers(tmp_path: Path) -> None:
    write_tiny(tmp_path, **config(hiden_size=64))
    code = (
        "import sys; from packhorse.recipe.load import load_recipe\n"
        "try: load_recipe('tiny.yaml')\n"
        "except Exception as error: assert 'hiden_size' in str(error)\n"
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
