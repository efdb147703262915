"""Every kind of mistake in a recipe: file:line, the value, the closest name; all at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packhorse.errors import UserError
from packhorse.recipe.load import load_recipe

KINDS = "full, ia3, lora, partial, prefix_tuning, prompt_tuning or qlora"
GOOD = (Path(__file__).parent / "conftest.py").read_text().split('GOOD = """\\\n')[1].split('"""')[0]
A_NAME = "a name of letters, digits, `.`, `_`, `-`, a letter or digit first, at most 100"


@pytest.fixture
def loaded_mistakes(write, mistakes_of):
    return lambda text: mistakes_of(write(text))


def test_a_good_recipe_loads(good):
    recipe = load_recipe(good)
    assert recipe.name == "good"
    assert recipe.optimizer.learning_rate == 0.0001
    assert recipe.method.kind == "lora"


@pytest.mark.parametrize(
    ("change", "line", "fact", "fix"),
    [
        (("epochs: 1", "epocs: 1"), 9, "epocs is not a field of the recipe.", "write `epochs`."),
        (
            ("learning_rate", "lerning_rate"),
            8,
            "optimizer.lerning_rate is not a field of optimizer.",
            "write `optimizer.learning_rate`.",
        ),
        (
            ("- path: rows", "- pth: rows"),
            6,
            "data.sources.0.pth is not a field of data.sources.0.",
            "write `data.sources.0.path`.",
        ),
        (("epochs: 1", "epochs: 1\nextend: a.yaml"), 10, "extend is not a field of the recipe.", "write `extends`."),
        (
            ("epochs: 1", "epochs: 1\nclip_norm: 2"),
            10,
            "clip_norm is not a field of the recipe.",
            "write `optimizer.clip_norm`.",
        ),
        (
            ("epochs: 1", "epochs: 1\ntrack: {zzz: 1}"),
            10,
            "track.zzz is not a field of track.",
            "remove it, or use one of every_steps, profile, noise_scale, wandb, wandb_project, tensorboard, mlflow.",
        ),
        (
            ("epochs: 1", "epochs: 1\nmethod: {kind: full, rank: 3}"),
            10,
            "method.rank is not a field of method.",
            "remove it, or set method.kind to lora or qlora.",
        ),
        (
            ("epochs: 1", "epochs: 1\nmethod: lore"),
            10,
            "method.kind is lore (text); it takes one of full, ia3, lora, partial, prefix_tuning, prompt_tuning, qlora.",  # noqa: E501
            "write `method.kind: lora`.",
        ),
        (
            ("epochs: 1", "epochs: 1\nmethod: {rank: 3}"),
            10,
            "method.kind is missing.",
            "add method.kind: one of full, ia3, lora, partial, prefix_tuning, prompt_tuning, qlora.",
        ),
        (
            ("epochs: 1", "epochs: 1\nmethod: 3"),
            10,
            f"method is 3 (a whole number); it takes {KINDS}, or a section with `kind`.",
            f"write method as {KINDS}, or a section with `kind`.",
        ),
        (
            ("epochs: 1", "epochs: 1\nmethod: {kind: lora, target: [q, 3]}"),
            10,
            "method.target.1 is 3 (a whole number); it takes text.",
            'quote it: `method.target.1: "3"`.',
        ),
        (
            ("- path: rows.jsonl", "- path: rows.jsonl\n      columns: {messages: 3}"),
            7,
            "data.sources.0.columns.messages is 3 (a whole number); it takes text.",
            'quote it: `data.sources.0.columns.messages: "3"`.',
        ),
        (
            ("1e-4", "'1e-4'"),
            8,
            "optimizer.learning_rate is 1e-4 (text); it takes a number above 0.",
            "write `optimizer.learning_rate: 1e-4`, without quotes.",
        ),
        (
            ("1e-4", "-1"),
            8,
            "optimizer.learning_rate is -1 (a whole number); it takes a number above 0.",
            "write optimizer.learning_rate as a number above 0.",
        ),
        (
            ("1e-4", ""),
            8,
            "optimizer.learning_rate is empty (nothing); it takes a number above 0.",
            "give optimizer.learning_rate a value, or remove the line.",
        ),
        (
            ("epochs: 1", "epochs: one"),
            9,
            "epochs is one (text); it takes a whole number above 0 or null.",
            "write epochs as a whole number above 0 or null.",
        ),
        (
            ("epochs: 1", "epochs: 1.5"),
            9,
            "epochs is 1.5 (a number); it takes a whole number above 0 or null.",
            "write epochs as a whole number above 0 or null.",
        ),
        (
            ("epochs: 1", "epochs: true"),
            9,
            "epochs is true (true or false); it takes a whole number above 0 or null.",
            "write epochs as a whole number above 0 or null.",
        ),
        (
            ("epochs: 1", "epochs: 1\ntrack: {tensorboard: yes}"),
            10,
            "track.tensorboard is yes (text); it takes true or false.",
            "write track.tensorboard as true or false.",
        ),
        (
            ("epochs: 1", "epochs: 1\ntrack: {wandb: offlin}"),
            10,
            "track.wandb is offlin (text); it takes one of auto, online, offline, off.",
            "write `track.wandb: offline`.",
        ),
        (
            ("epochs: 1", "epochs: 1\nbatch: {micro: atuo}"),
            10,
            "batch.micro is atuo (text); it takes a whole number above 0 or auto.",
            "write `batch.micro: auto`.",
        ),
        (
            ("epochs: 1", "epochs: 1\nparallel:"),
            10,
            "parallel is empty (nothing); it takes a section.",
            "give parallel a value, or remove the line.",
        ),
        (
            ("epochs: 1", "epochs: 1\nparallel: zero3"),
            10,
            "parallel is zero3 (text); it takes a section.",
            "write parallel as a section.",
        ),
        (
            ("    - path: rows.jsonl", "      path: rows.jsonl"),
            5,
            'data.sources is {"path": "rows.jsonl"} (a section); it takes a list of one or more sections.',
            "write data.sources as a list of one or more sections.",
        ),
        (
            ("name: good", "name: 'good run!'"),
            1,
            f"name is good run! (text); it takes {A_NAME}.",
            "write `name: good-run`.",
        ),
        (
            ("name: good", "name: 12"),
            1,
            f"name is 12 (a whole number); it takes {A_NAME}.",
            'quote it: `name: "12"`.',
        ),
        (
            ("id: org/model", "id: org/model\n  revision: 1234567"),
            4,
            "model.revision is 1234567 (a whole number); it takes text or null.",
            'quote it: `model.revision: "1234567"`.',
        ),
        (
            ("  learning_rate: 1e-4", "  weight_decay: 0"),
            7,
            "optimizer.learning_rate is missing.",
            "add optimizer.learning_rate: a number above 0.",
        ),
        (
            ("name: good\n", ""),
            1,
            "name is missing.",
            f"add name: {A_NAME}.",
        ),
        (("optimizer:\n  learning_rate: 1e-4\n", ""), 1, "optimizer is missing.", "add optimizer with learning_rate."),
        (
            ("epochs: 1", "epochs: 1\noptimizer: {learning_rate: 1e-4}"),
            10,
            "`optimizer` is given twice, first in line 7.",
            "remove one `optimizer`.",
        ),
        (
            ("1e-4", "1e-4\n  betas: [a, 0.9]"),
            9,
            "optimizer.betas.0 is a (text); it takes a number from 0 to 1.",
            "write optimizer.betas.0 as a number from 0 to 1.",
        ),
        (
            ("1e-4", "1e-4\n  betas: [0.9]"),
            9,
            "optimizer.betas is [0.9]; it takes a list of 2 items, each a number from 0 to 1.",
            "write optimizer.betas as a list of 2 items, each a number from 0 to 1.",
        ),
    ],
)
def test_one_mistake(loaded_mistakes, change, line, fact, fix):
    assert change[0] in GOOD
    (mistake,) = loaded_mistakes(GOOD.replace(*change))
    assert (mistake.where, mistake.fact, mistake.fix) == (f"my.yaml:{line}", fact, fix)


def test_all_mistakes_at_once_in_the_order_of_the_file(write, mistakes_of):
    name = write(
        "name: x y\n"
        "model: {path: a, id: b}\n"
        "data:\n"
        "  sources:\n"
        "    - {path: a, frmat: text}\n"
        "    - {}\n"
        "  split: {train: 0.5}\n"
        "batch: {packs: 10, micro: 6}\n"
        "optimizer: {learning_rate: fast}\n"
        "name: twice\n"
        "runs_folder: ${env:PACKHORSE_NOT_SET}\n"
    )
    found = mistakes_of(name, "seed=x", "nothing")
    assert [mistake.where for mistake in found] == [
        "my.yaml:1", "my.yaml:1", "my.yaml:2", "my.yaml:5", "my.yaml:6", "my.yaml:7", "my.yaml:8", "my.yaml:9",
        "my.yaml:10", "my.yaml:11", "override nothing", "override seed=x",
    ]  # fmt: skip


def test_a_mistyped_required_key_is_reported_once(write, mistakes_of):
    (mistake,) = mistakes_of(write(GOOD.replace("model:", "modle:")))
    assert mistake.fix == "write `model`."


@pytest.mark.parametrize("key", ["learning_rate", "optimizer.learning_rte"])
def test_override_typos_name_the_override(good, mistakes_of, key):
    (mistake,) = mistakes_of(good, f"{key}=1e-3")
    assert mistake.where == f"override {key}=1e-3"
    assert mistake.fix == "write `optimizer.learning_rate`."


def test_missing_file_names_the_closest(write, mistakes_of, monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart/ful.yaml")
    (mistake,) = caught.value.mistakes
    assert "quickstart/ful.yaml" in mistake.fact
    assert mistake.fix == "write quickstart/full."


SECTIONS = ["", "model.", "data.", "data.split.", "data.sources.0.", "batch.", "optimizer.", "schedule.", "parallel.",
            "evaluation.", "checkpoint.", "track."]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(section=st.sampled_from(SECTIONS), key=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_unknown_key_is_taken_at_any_depth(good, section, key):
    recipe = load_recipe(good)
    target = recipe
    for step in section.split(".")[:-1]:
        target = target[int(step)] if step.isdigit() else getattr(target, step)
    if key in type(target).model_fields:
        return
    with pytest.raises(UserError) as caught:
        load_recipe(good, [f"{section}{key}=1"])
    (mistake,) = caught.value.mistakes
    assert mistake.where == f"override {section}{key}=1"
    assert mistake.fact.startswith(f"{section}{key} is not a field of ")


def test_the_environment_is_checked_and_never_expanded(write, mistakes_of, monkeypatch):
    text = GOOD.replace("path: rows.jsonl", "path: ${env:PACKHORSE_ROWS}/rows.jsonl")
    name = write(text)
    (mistake,) = mistakes_of(name)
    assert mistake.where == "my.yaml:6"
    assert "PACKHORSE_ROWS" in mistake.fact
    assert load_recipe(name, check_environment=False).data.sources[0].path == "${env:PACKHORSE_ROWS}/rows.jsonl"
    monkeypatch.setenv("PACKHORSE_ROWS", "/secret")
    assert load_recipe(name).data.sources[0].path == "${env:PACKHORSE_ROWS}/rows.jsonl"


@pytest.mark.parametrize("text", ["${HOME}/x", "${env:}", "${env:A-B}", "${env:HOME"])
def test_other_references_are_refused(good, mistakes_of, text):
    (mistake,) = mistakes_of(good, f"runs_folder={text}")
    assert "write ${env:NAME}" in mistake.fix


def test_secrets_are_not_shown(write, monkeypatch):
    monkeypatch.setenv("PACKHORSE_SECRET", "hunter2")
    name = write(GOOD.replace("epochs: 1", "epochs: ${env:PACKHORSE_SECRET}"))
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    assert "hunter2" not in str(caught.value)


def test_loading_imports_no_torch():
    code = (
        "import sys; from packhorse.recipe import load, shipped, describe\n"
        "load.load_recipe('quickstart/full'); describe.reference()\n"
        "assert not {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
