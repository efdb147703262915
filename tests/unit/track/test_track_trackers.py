import subprocess
import sys

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.track.trackers import GuardedTracker, open_tensorboard, open_trackers, wandb_id, wandb_mode
from packhorse.workflows.early_checks import check_start


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    Accelerator(cpu=True)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def make_recipe(**track):
    return Recipe.model_validate(
        {
            "name": "tracked",
            "model": {"path": "m"},
            "data": {"sources": [{"path": "${env:SECRET_PLACE}/rows.jsonl"}]},
            "optimizer": {"learning_rate": 1e-3},
            "steps": 3,
            "track": {"wandb_project": "project", **track},
        }
    )


class Recorder:
    def __init__(self, fails_at=""):
        self.fails_at = fails_at
        self.calls = []

    def _do(self, name):
        self.calls.append(name)
        if name == self.fails_at:
            raise ConnectionError("no\n network")

    def start(self):
        self._do("start")

    def log(self, values, step):
        self._do("log")

    def finish(self):
        self._do("finish")


@pytest.mark.parametrize(
    ("fails_at", "calls"),
    [("", ["start", "log", "log", "finish"]), ("start", ["start"]), ("log", ["start", "log"])],
)
def test_a_tracker_that_fails_is_given_up_with_one_line(fails_at, calls, caplog):
    recorder = Recorder(fails_at)
    tracker = GuardedTracker("W&B", recorder)
    tracker.log(1, {"train/loss": 1.0})
    tracker.log(2, {"train/loss": 1.0})
    tracker.close()
    assert recorder.calls == calls
    assert [record.getMessage() for record in caplog.records] == (
        ["W&B is off for this run (no network); metrics.jsonl still gets all figures."] if fails_at else []
    )


@pytest.mark.parametrize(
    ("choice", "environment", "has_netrc", "mode"),
    [
        ("off", {"WANDB_API_KEY": "k"}, True, None),
        ("online", {}, False, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, False, "offline"),
        ("auto", {}, False, "offline"),
        ("auto", {"WANDB_API_KEY": ""}, False, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, False, "online"),
        ("auto", {}, True, "online"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.example.org"}, True, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, False, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, False, None),
    ],
)
def test_how_wandb_runs(tmp_path, choice, environment, has_netrc, mode):
    file = tmp_path / "keys"
    if has_netrc:
        file.write_text("machine api.wandb.ai login user password " + "a" * 40 + "\n")
    assert wandb_mode(choice, environment, file) == mode


def test_the_wandb_id_is_made_once_per_run_folder(tmp_path):
    first, other = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    other.mkdir()
    assert wandb_id(first) == wandb_id(first) == (first / "wandb_id.txt").read_text().strip()
    assert wandb_id(first) != wandb_id(other)


def test_offline_wandb_keeps_one_id_over_attempts_and_shows_the_recipe_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_PLACE", "/very/secret")
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        (tracker,) = open_trackers(make_recipe(wandb="auto"), run, step, {"data_ledger": {"losses": {"bad": 3}}})
        assert tracker._tracker.run.id == wandb_id(run)
        assert tracker._tracker.run.offline
        assert tracker._tracker.run.config["data"]["sources"][0]["path"] == "${env:SECRET_PLACE}/rows.jsonl"
        assert tracker._tracker.run.config["track"]["wandb_project"] == "project"
        assert tracker._tracker.run.config["data_ledger"]["losses"]["bad"] == 3
        tracker.log(step, {"train/loss": 1.0})
        tracker.close()
    files = list((run / "wandb").glob(f"offline-run-*/run-{wandb_id(run)}.wandb"))
    assert files
    assert not any(b"/very/secret" in file.read_bytes() for file in files)


OPEN_ONLINE = """
import json, logging, sys
from pathlib import Path
from accelerate import Accelerator
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.track.trackers import open_wandb
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stdout)
Accelerator(cpu=True)
tracker = open_wandb(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), "online", timeout_seconds=2.0)
tracker.log(1, {"train/loss": 1.0})
tracker.close()
print("trained on")
"""


@pytest.mark.parametrize(
    ("key", "reason"),
    [("a" * 40, "127.0.0.1:9"), ("short", "key"), ("", "No API key")],
    ids=["refused", "bad", "absent"],
)
def test_wandb_that_cannot_be_reached_warns_once_and_training_goes_on(tmp_path, monkeypatch, key, reason):
    # A process of its own: wandb keeps the first server that it met for the life of a process.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard port: nobody listens
    monkeypatch.setenv("WANDB_API_KEY", key)
    command = [sys.executable, "-c", OPEN_ONLINE, make_recipe().model_dump_json(), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stdout.splitlines() if line.startswith("packhorse")]
    assert len(ours) == 1
    assert ours[0].startswith("packhorse.track.trackers: W&B is off for this run (")
    assert reason in ours[0]
    assert done.stdout.endswith("trained on\n")


def test_tensorboard_holds_each_step_once_over_a_resume(tmp_path):
    first = open_tensorboard(tmp_path, first_step=1)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.close()
    second = open_tensorboard(tmp_path, first_step=3)
    second.log(3, {"train/loss": 30.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_nothing_is_opened_where_nothing_is_asked(tmp_path):
    assert open_trackers(make_recipe(wandb="off"), tmp_path, first_step=1) == []
    assert not (tmp_path / "wandb").exists()


def test_wandb_is_not_imported_until_it_is_used():
    code = "import sys, packhorse.track.trackers; print('wandb' in sys.modules, 'tensorboard' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "False False\n"
    )


def test_mlflow_keeps_one_run_with_its_parameters_over_a_resume(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    run_folder = tmp_path / "runs" / "tracked"
    run_folder.mkdir(parents=True)
    for step, loss in ((1, 1.5), (2, float("nan"))):
        recipe = make_recipe(wandb="off", mlflow=True, every_steps=step)
        (tracker,) = open_trackers(recipe, run_folder, first_step=step)
        tracker.log(step, {"train/loss": loss})
        tracker.close()
        assert tracker.alive
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "runs" / ".mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, str(each.value)) for each in history] == [(1, "1.5"), (2, "nan")]
    assert run.info.run_name == "tracked"
    assert (run.data.params["optimizer.learning_rate"], run.data.params["track.every_steps"]) == ("0.001", "1")
    assert run.data.params["data.sources"].startswith("[{'path': '${env:SECRET_PLACE}/rows.jsonl'")


def test_mlflow_without_its_package_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("packhorse.workflows.early_checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"track.mlflow is true, and mlflow is not installed"):
        check_start(make_recipe(mlflow=True))
    check_start(make_recipe())
