"""Shipped recipes load, are written and read back equal, and work as copies anywhere."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packhorse.errors import UserError
from packhorse.recipe.describe import reference, summary
from packhorse.recipe.load import dump_recipe, load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.recipe.shipped import copy_recipe, list_recipes, shipped_path

NAMES = [
    "gemma3-1b/full",
    "gemma3-1b/lora",
    "llama3.1-8b/dpo",
    "llama3.1-8b/full",
    "llama3.1-8b/lora",
    "llama3.1-8b/qlora",
    "llama3.2-1b/full",
    "llama3.2-1b/lora",
    "llama3.2-1b/reward",
    "llama3.2-3b/lora",
    "llama3.3-70b/lora",
    "llama3.3-70b/qlora",
    "mistral-7b/lora",
    "mixtral-8x7b/lora",
    "phi3.5-mini/lora",
    "phi4/lora",
    "quickstart/full",
    "quickstart/lora",
    "quickstart/qlora",
    "qwen2.5-0.5b/full",
    "qwen2.5-1.5b/lora",
    "qwen2.5-14b/lora",
    "qwen2.5-32b/qlora",
    "qwen2.5-72b/qlora",
    "qwen2.5-7b/dpo",
    "qwen2.5-7b/full",
    "qwen2.5-7b/kto",
    "qwen2.5-7b/lora",
    "qwen3-0.6b/distil",
    "qwen3-0.6b/full",
    "qwen3-30b-a3b/lora",
    "qwen3-32b/qlora",
    "qwen3-4b/lora",
    "qwen3-8b/lora",
]
PREFERENCE = ("llama3.1-8b/dpo", "llama3.2-1b/reward", "qwen2.5-7b/dpo", "qwen2.5-7b/kto")
# From 30 billion parameters on, half the learning rate (QLoRA paper).
LARGE = ("70b", "72b", "32b", "30b", "8x7b")


def test_the_shipped_recipes_are_these():
    assert [recipe.name for recipe in list_recipes()] == NAMES


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_each_says_title_gpus_and_command(recipe):
    assert recipe.title
    assert recipe.gpus
    assert recipe.command.startswith(f"packhorse train {recipe.name}")


@pytest.mark.parametrize("name", NAMES)
def test_names_and_methods_agree(name):
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "-")
    what = name.split("/")[1]
    assert what in (recipe.objective.kind, recipe.method.kind)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not name.startswith("quickstart") and name not in PREFERENCE]
)
def test_large_recipes_follow_good_practice(name):
    recipe = load_recipe(name)
    assert recipe.batch.packs * recipe.batch.length == 262_144
    assert recipe.batch.packs % 64 == 0
    assert recipe.optimizer.clip_norm == 1.0
    assert recipe.optimizer.weight_decay == 0.01
    assert 0.03 <= recipe.schedule.warmup_ratio <= 0.05
    assert recipe.epochs in {1, 2, 3}
    assert recipe.precision == "bf16"
    if recipe.method.kind == "full":
        assert 1e-5 <= recipe.optimizer.learning_rate <= 2e-5
    else:
        assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (32, 64.0, 0.05)
        assert recipe.method.target == "all-linear"
        assert recipe.optimizer.learning_rate == (1e-4 if any(size in name for size in LARGE) else 2e-4)


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_recipes_take_small_steps_once_over_pairs_that_fit(name):
    recipe = load_recipe(name)
    assert recipe.batch.packs * recipe.batch.length == 65_536
    assert recipe.epochs == 1
    assert recipe.data.over_long == "drop"
    if recipe.method.kind == "lora":
        assert (recipe.method.dropout, recipe.optimizer.learning_rate) == (0, 5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_back_is_equal(name, write):
    recipe = load_recipe(name)
    assert load_recipe(write(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_works_in_another_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = copy_recipe(name, "sub/my.yaml")
    assert load_recipe(str(copy)) == load_recipe(name)
    assert copy.read_text() == shipped_path("recipes", f"{name}.yaml").read_text()


def test_a_copy_overwrites_nothing(tmp_path):
    target = tmp_path / "my.yaml"
    target.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        copy_recipe("quickstart/full", target)
    assert target.read_text() == "mine"


def test_a_copy_into_a_folder_keeps_its_name(tmp_path):
    assert copy_recipe("quickstart/full", tmp_path) == tmp_path / "full.yaml"


@pytest.mark.parametrize("target", ["/proc/nowhere/my.yaml", "file/my.yaml"])
def test_a_copy_to_where_none_can_be(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        copy_recipe("quickstart/full", target)


def test_unknown_names_are_told_the_closest(tmp_path):
    with pytest.raises(UserError, match=r"write llama3\.1-8b/lora"):
        copy_recipe("llama3.1-8b/lra", tmp_path / "x.yaml")
    with pytest.raises(UserError, match=r"write quickstart/full\.yaml"):
        shipped_path("recipes", "quickstart/ful.yaml")


def test_nothing_outside_the_shipped_folder_is_found(tmp_path):
    with pytest.raises(UserError):
        copy_recipe("../pyproject", tmp_path / "x.yaml")


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
TRICKY = st.sampled_from(["1e-4", "off", "1_000", "null", "~", "", " x ", "a: b", "# x", "- x", "1:30", "é\n\tü", "<<"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(st.text(max_size=8) | TRICKY, JSON_LIKE | TRICKY, max_size=5), text=TRICKY)
def test_any_recipe_is_written_and_read_back_equal(write, config, text):
    recipe = Recipe.model_validate({
        "name": "x",
        "model": {"config": {"model_type": "llama", "rope_parameters": config}, "tokenizer": "t"},
        "method": "full",
        "data": {"sources": [{"path": "rows.jsonl"}], "split": {"stratify": [text]}},
        "optimizer": {"learning_rate": 1e-5},
        "steps": 3,
    })  # fmt: skip
    if "${" in str(config):
        return
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_the_reference_names_every_field():
    text = reference()
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in text
    for line in ("## optimizer", "### data.split", "### data.sources[]", "## method qlora"):
        assert line in text.splitlines()
    assert "| `learning_rate` | a number above 0 | required | Peak learning rate, reached after the warm-up. |" in text


def test_the_summary_says_what_a_step_is():
    lines = dict(summary(load_recipe("llama3.1-8b/lora")))
    assert lines["step"] == "64 packs of 4,096 tokens: 262,144 tokens"
    assert lines["method"] == "lora, rank 32, alpha 64, all-linear"
    assert lines["learning rate"] == "0.0002, cosine, warm-up 3%"
