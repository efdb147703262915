"""`extends` and overrides: which value has priority, and which line is reported."""

import pytest

from packhorse.errors import UserError
from packhorse.recipe.load import load_recipe

BASE = """\
name: base
seed: 7
model: {id: org/model}
method: {kind: lora, rank: 8}
data:
  sources:
    - {path: a.jsonl}
    - {path: b.jsonl}
optimizer:
  learning_rate: 1e-4
  weight_decay: 0.5
epochs: 1
"""


@pytest.fixture
def base(write):
    return write(BASE, "base.yaml")


def test_sections_are_joined_and_lists_replaced(base, write):
    top = "extends: base.yaml\nname: top\noptimizer: {learning_rate: 2e-4}\ndata: {sources: [{path: c.jsonl}]}\n"
    recipe = load_recipe(write(top, "top.yaml"))
    assert (recipe.name, recipe.seed) == ("top", 7)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (2e-4, 0.5)
    assert [source.path for source in recipe.data.sources] == ["c.jsonl"]


def test_extends_is_relative_to_its_own_file(write):
    write(BASE, "shared/base.yaml")
    write("extends: ../shared/base.yaml\nname: middle\n", "family/middle.yaml")
    assert load_recipe(write("extends: family/middle.yaml\nseed: 9\n")).seed == 9


def test_extends_a_shipped_recipe(write):
    recipe = load_recipe(write("extends: llama3.1-8b/lora.yaml\nname: mine\n"))
    assert recipe.model.id == "meta-llama/Llama-3.1-8B-Instruct"


def test_a_mistake_keeps_the_line_of_its_own_file(write, mistakes_of):
    write(BASE.replace("weight_decay", "weight_decai"), "base.yaml")
    top = write("extends: base.yaml\noptimizer:\n  learning_rate: x\nbatch: {packs: 0}\n", "top.yaml")
    found = mistakes_of(top)
    assert [mistake.where for mistake in found] == ["base.yaml:11", "top.yaml:3", "top.yaml:4"]


def test_two_models_are_told_where_the_second_was_given(base, write, mistakes_of):
    (mistake,) = mistakes_of(write("extends: base.yaml\nseed: 1\nmodel: {path: local}\n", "top.yaml"))
    assert mistake.where == "top.yaml:3"
    assert mistake.fact == "model gives id and path at once."


@pytest.mark.parametrize(
    ("top", "steps", "epochs"),
    [("extends: base.yaml\nsteps: 5\n", 5, None), ("extends: base.yaml\nepochs: 3\n", None, 3)],
)
def test_steps_above_replace_epochs_below(base, write, top, steps, epochs):
    recipe = load_recipe(write(top, "top.yaml"))
    assert (recipe.steps, recipe.epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("files", "where", "words"),
    [
        ({"my.yaml": "name: x\nextends: my.yaml\n"}, "my.yaml:2", "extends itself"),
        ({"my.yaml": "extends: b.yaml\n", "b.yaml": "\n\nextends: my.yaml\n"}, "b.yaml:3", "extends itself"),
        ({"my.yaml": "\nextends: nope.yaml\n"}, "my.yaml:2", "names nope.yaml"),
        ({"my.yaml": "extends: [a, b]\n"}, "my.yaml:1", "a list, not a file"),
        ({"my.yaml": "extends: b.yaml\n", "b.yaml": "a: 1\nb: [\n"}, "b.yaml:3", "not YAML"),
    ],
    ids=["itself", "cycle", "missing", "list", "broken-base"],
)
def test_bad_extends(write, mistakes_of, files, where, words):
    for name, text in files.items():
        write(text, name)
    (mistake,) = mistakes_of("my.yaml")
    assert mistake.where == where
    assert words in mistake.fact


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("batch.packs=1_000", "batch.packs", 1000),
        ("track.wandb=off", "track.wandb", "off"),
        ("track.tensorboard=true", "track.tensorboard", True),
        ("data.sources.1.path=x=y.jsonl", "data.sources.1.path", "x=y.jsonl"),
        ("data.split.stratify=[a, b]", "data.split.stratify", ["a", "b"]),
        ("data.sources=[{path: z}]", "data.sources.0.path", "z"),
        ("name='12'", "name", "12"),
        ("method=full", "method.kind", "full"),
        ("method.rank=4", "method.rank", 4),
        ("model.tokenizer=a: b", "model.tokenizer", "a: b"),
    ],
)
def test_overrides(base, override, path, value):
    found = load_recipe(base, [override])
    for step in path.split("."):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    assert found == value
    assert type(found) is type(value)


def test_override_into_a_method_written_as_a_word(write):
    name = write(BASE.replace("{kind: lora, rank: 8}", "qlora"), "base.yaml")
    method = load_recipe(name, ["method.rank=4"]).method
    assert (method.kind, method.rank) == ("qlora", 4)


def test_the_last_override_wins(base):
    assert load_recipe(base, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [(["steps=5"], 5, None), (["epochs=4"], None, 4), (["steps=5", "epochs=null"], 5, None)],
)
def test_overriding_steps_replaces_epochs(base, overrides, steps, epochs):
    recipe = load_recipe(base, overrides)
    assert (recipe.steps, recipe.epochs) == (steps, epochs)


def test_steps_and_epochs_both_overridden_is_refused(base, mistakes_of):
    (mistake,) = mistakes_of(base, "steps=5", "epochs=2")
    assert mistake.fact == "steps is 5 and epochs is 2."
    assert mistake.where.startswith("override ")


def test_another_model_needs_the_first_unset(base, mistakes_of):
    (mistake,) = mistakes_of(base, "model.path=local")
    assert mistake.where == "override model.path=local"
    assert "model.id=null" in mistake.fix
    assert load_recipe(base, ["model.path=local", "model.id=null"]).model.path == "local"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "is not an override"),
        ("=3", "is not an override"),
        ("a..b=3", "is not an override"),
        ("--seed=3", "is not an override"),
        ("seed=", "gives no value"),
        ("seed.x=3", "seed is 7, so it has no x."),
        ("data.sources.2.path=x", "data.sources has no item 2."),
        ("data.sources.first.path=x", "data.sources has no item first."),
        ("name=[1", "not YAML"),
        ("model.config={a: 1, a: 2}", "twice"),
    ],
)
def test_malformed_overrides(base, mistakes_of, override, words):
    (mistake,) = mistakes_of(base, override)
    assert words in mistake.fact
    assert mistake.where == f"override {override}"


def test_lines_are_relative_to_the_current_folder(write, monkeypatch, tmp_path):
    write("extends: base.yaml\n", "sub/top.yaml")
    write(BASE.replace("seed: 7", "seed: x"), "sub/base.yaml")
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "sub" / "top.yaml"))
    assert caught.value.mistakes[0].where == "base.yaml:2"
