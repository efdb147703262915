"""SkyPilot and Kubeflow files as reviewed text (`--write-golden` rewrites it), validated with the published schemas."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from packhorse.cli.main import main

HERE = Path(__file__).parent
SCHEMAS = HERE / "schemas"
KUBEFLOW = {"trainjob": "TrainJob", "pytorchjob": "PyTorchJob"}
TWO_NODES = ["--gpus", "16xH100-80GB", "--nodes", "2"]
CASES = {
    "two-nodes": ["llama3.1-8b/lora", *TWO_NODES],
    "one-gpu": ["llama3.1-8b/qlora", "--gpus", "1xA100-40GB"],
    "cpu": ["quickstart/full"],
}


def validator(kind: str) -> jsonschema.Draft202012Validator:
    if kind == "sky":
        return jsonschema.Draft202012Validator(json.loads((SCHEMAS / "skypilot.json").read_text()))
    whole = json.loads((SCHEMAS / "kubeflow.json").read_text())
    return jsonschema.Draft202012Validator({**whole, "$ref": f"#/$defs/{KUBEFLOW[kind]}"})


def printed(name: str, kind: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    options = ["--to", kind, "--image", "registry.example/packhorse:0.1", "--volume", "training:/mnt/training"]
    words = ["manifest", *CASES[name], *options, "runs_folder=/mnt/training/runs", *more]
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})


@pytest.mark.parametrize("kind", ["sky", "trainjob", "pytorchjob"])
@pytest.mark.parametrize("name", CASES)
def test_task_files_are_as_reviewed_and_valid(
    name: str, kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(name, kind, capsys)
    validator(kind).validate(yaml.safe_load(text))
    golden = HERE / "manifests" / f"{name}.{kind}.yaml"
    if request.config.getoption("--write-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("sky", ("resources", "accelerator")),
        ("trainjob", ("spec", "trainer", "numNode")),
        ("trainjob", ("spec", "runtimePatches", 0, "podSpec")),
        ("pytorchjob", ("spec", "pytorchReplicaSpecs", "Master", "template", "spec", "volume")),
    ],
)
def test_the_schemas_refuse_an_unknown_field(kind: str, path: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(printed("two-nodes", kind, capsys))
    part = content
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError):
        validator(kind).validate(content)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--to", "k8s"], "--to is 'k8s'"),
        (["--image", "a b"], "--image is 'a b'"),
        (["--image", "$(touch canary)"], "--image is"),
        (["--volume", "training"], "--volume is 'training'"),
        (["--volume", "tr:/mnt/tr$(touch canary)"], "--volume is"),
        (["--volume", "training:/elsewhere"], "which is not below /elsewhere"),
        (["runs_folder=/mnt/training/a $(touch canary)"], "takes plain paths only"),
        (["--gpus", "8"], "the plan is for 8 GPUs, without a name"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--to": "sky", "--image": "p:1", "--volume": "training:/mnt/training", "--gpus": "16xH100-80GB"}
    folder = "runs_folder=/mnt/training/runs"
    if words[0].startswith("--"):
        given[words[0]] = words[1]
    else:
        folder = words[0]
    flags = [word for pair in given.items() for word in pair]
    assert main(["manifest", "llama3.1-8b/lora", *flags, folder]) == 2
    assert fact in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
