"""A recipe contains no secret: neither in the file nor in an override, neither as a value nor as a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.cli.main import main
from packhorse.recipe.load import load_recipe
from secrets_made_up import SECRETS

GOOD = (Path(__file__).parent / "conftest.py").read_text().split('GOOD = """\\\n')[1].split('"""')[0]
TOKEN = SECRETS["hugging face"]


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_in_an_override_is_refused(good, mistakes_of, secret):
    found = mistakes_of(good, f"track.wandb_project={secret!r}" if "\n" in secret else f"track.wandb_project={secret}")
    assert any(mistake.fact.startswith("track.wandb_project contains ") for mistake in found)
    assert any("${env:NAME}" in mistake.fix for mistake in found)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("path: rows.jsonl", f"path: https://x.org/{TOKEN}/rows.jsonl"), 6),
        (("name: good", f"name: {TOKEN}"), 1),
        (("epochs: 1", f"epochs: 1\nmodel_token: {TOKEN}"), 10),
        (("path: rows.jsonl", f"path: rows.jsonl\n      columns: {{messages: {TOKEN}}}"), 7),
        (("path: rows.jsonl", f"path: rows.jsonl\n      columns: {{{TOKEN}: x}}"), 7),
    ],
    ids=["path", "name", "unknown key", "value of a mapping", "key of a mapping"],
)
def test_a_secret_in_the_file_is_refused_with_its_line(write, mistakes_of, change, line):
    found = [each for each in mistakes_of(write(GOOD.replace(*change))) if "a Hugging Face token" in each.fact]
    assert {mistake.where for mistake in found} == {f"my.yaml:{line}"}


def test_what_the_environment_keeps_secret_may_not_stand_in_the_recipe(good, mistakes_of, monkeypatch):
    monkeypatch.setenv("OUR_PASSWORD", "no form at all")
    (mistake,) = mistakes_of(good, "track.wandb_project=x no form at all y")
    assert mistake.fact == "track.wandb_project contains the value of the environment variable OUR_PASSWORD."
    assert load_recipe(good, ["track.wandb_project=no form at"]).track.wandb_project == "no form at"


def test_a_reference_to_a_secret_is_refused_as_paths_are_written_down(good, mistakes_of, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (mistake,) = mistakes_of(good, "runs_folder=/scratch/${env:HF_TOKEN}/runs")
    assert mistake.fact.startswith("runs_folder refers to ${env:HF_TOKEN}")
    monkeypatch.setenv("PARTITION_KEY", "short")
    assert load_recipe(good, ["runs_folder=/scratch/${env:PARTITION_KEY}"])


def test_the_files_of_a_run_hold_what_the_recipe_says_so_nothing_is_written(good, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    for verb in ("check", "prepare", "train", "plan"):
        assert main([verb, good, f"track.wandb_project={TOKEN}"]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert "contains a Hugging Face token" in capsys.readouterr().err
