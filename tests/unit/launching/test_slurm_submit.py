"""`packhorse submit` up to the call of Slurm, and runs that wait for their data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.launching.slurm.client import SlurmClient, StartEstimate
from packhorse.launching.slurm.submit import only_submission
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.lock import lock_for_job, release_job_lock
from packhorse.run_folder.status import read_status
from tiny import write_tiny

ONE_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of four processes and a site without GPUs; there is no Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ONE_ROW)}\n" * 32)
    write_tiny(
        tmp_path,
        data={"sources": [{"path": "rows.jsonl"}], "split": {"train": 1.0, "validation": 0.0, "test": 0.0}},
        parallel={"processes": 4},
        evaluation={"max_answered_rows": 0},
        name="first",
    )
    write_site(tmp_path)
    return tmp_path


def write_site(folder: Path, **fields: object) -> None:
    site = {"name": "here", "gpus_per_node": 0, "cpus_per_node": 2, "time": "00:10:00", **fields}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))


def test_a_dry_run_shows_scripts_and_commands_and_makes_no_run(folder: Path, capsys) -> None:
    assert main(["submit", "tiny.yaml", "--nodes", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    run = folder / "runs" / "first"
    assert "#SBATCH --job-name=first-prepare\n" in shown
    assert "#SBATCH --job-name=first\n#SBATCH --nodes=2\n" in shown
    commands = shown[shown.index("# commands\n") :].splitlines()[1:3]
    assert commands[0] == f"sbatch --parsable {run}/prepare.sbatch prepare {run}"
    after = "--dependency=afterok:JOB_prepare --kill-on-invalid-dep=yes"
    assert commands[1] == f"sbatch --parsable {after} {run}/job.sbatch {run}"
    assert not run.exists()


def test_without_slurm_the_script_is_shown_and_the_exit_code_says_so(folder: Path, capsys) -> None:
    assert main(["submit", "tiny.yaml"]) == 2
    told = capsys.readouterr()
    assert "#SBATCH --job-name=first\n" in told.out
    assert told.err.startswith("there is no Slurm here: ")
    assert not (folder / "runs" / "first").exists()


def test_data_that_is_prepared_needs_no_job(folder: Path, capsys) -> None:
    assert main(["prepare", "tiny.yaml"]) == 0
    capsys.readouterr()
    assert main(["submit", "tiny.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "prepare.sbatch" not in shown
    assert "--dependency" not in shown[shown.index("# commands") :]


@pytest.mark.parametrize(
    ("words", "site", "said"),
    [
        (["--time", "10"], {}, "--time is '10'"),
        (["--time", "00:10:00\n#SBATCH --uid=0"], {}, "--time is "),
        (["--time", "$(id)"], {}, "--time is "),
        (["--time", "02:00:00"], {"longest_time": "01:00:00"}, "longest_time of here is 01:00:00"),
        (["--time", "00:03:00"], {}, "180 s of it are kept for saving"),
        (["--gpus-per-node", "8"], {}, "a node of here has 0 GPUs"),
        (["--nodes", "3"], {}, "parallel.processes is 4, which 3 nodes cannot share equally"),
        (["--nodes", "0"], {}, "--nodes is 0"),
        (["--nods", "2"], {}, "did you mean --nodes"),
        (["name=a b"], {}, "name is a b"),
        (["name=$(touch canary)"], {}, "name is "),
        (["name=-x"], {}, "name is "),
        (["runs_folder=a b"], {}, "set runs_folder to"),
        (["runs_folder=$(touch canary)"], {}, "set runs_folder to"),
        (["runs_folder=x%j"], {}, "set runs_folder to"),
        (["runs_folder=a\nb"], {}, "runs_folder"),
        ([], {"shared": ["/nowhere"]}, "is in none of the folders that the nodes of here see: /nowhere"),
        ([], {"partition": "a b"}, "site.yaml:4: partition is a b (text)"),
        (["--site", "other.yaml"], {}, "there is no file other.yaml"),
        (["--site", "$(touch canary)"], {}, "there is no file"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_can_be_refused_without_slurm_is(
    words: list[str], site: dict[str, object], said: str, folder: Path, capsys
) -> None:
    write_site(folder, **site)
    before = {path.name for path in folder.iterdir()} | {"runs"}
    assert main(["submit", "tiny.yaml", *words]) == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} <= before
    assert not (folder / "runs" / "first").exists()


def test_an_override_never_reaches_a_script(folder: Path, capsys) -> None:
    nasty = "$(touch canary) ; `touch canary` ' \" \\"
    assert main(["submit", "tiny.yaml", "--dry-run", f"track.wandb_project={nasty}"]) == 0
    assert "canary" not in capsys.readouterr().out


def waiting_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run after `submit` has sent two jobs to a replaced Slurm."""
    sent: list[list[str]] = []
    run = folder / "runs" / "first"

    def submit(_: SlurmClient, words: list[str]) -> str:
        sent.append(words)
        number = str(10 + len(sent))
        # A job may start before the next one is sent, and then holds the run.
        lock_for_job(run, number, number)
        release_job_lock(run, number)
        with pytest.raises(UserError, match="is being submitted by another process"), only_submission(run):
            pass
        return number

    monkeypatch.setattr(SlurmClient, "submit", submit)
    monkeypatch.setattr(
        "packhorse.workflows.submit_run.check_jobs", lambda site, jobs: [StartEstimate(1.0, "n1", "p")] * 2
    )
    assert main(["submit", "tiny.yaml", "--nodes", "2"]) == 0
    return run


def test_a_run_waits_for_its_data_and_the_job_that_prepares_it_plans_it_to_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = waiting_run(folder, monkeypatch)
    told = " ".join(capsys.readouterr().out.split())
    assert "job 11 prepare: 1 node, 8 CPUs each, 04:00:00 at most; may start at" in told
    assert "job 12 train: 2 nodes, 2 CPUs each, 00:10:00 at most; begins when job 11 has ended well" in told
    jobs = [json.loads(line) for line in (run / "jobs.jsonl").read_text().splitlines()]
    assert [(job["job_id"], job["kind"], job["depends_on"]) for job in jobs] == [
        ("11", "prepare", []),
        ("12", "train", ["11"]),
    ]
    assert {"job.sbatch", "prepare.sbatch", "site.json", "plan.json", "recipe.yaml"} <= {f.name for f in run.iterdir()}
    assert read_status(run).state == "waiting"
    assert open_run("first").data is None

    assert main(["submit", "runs/first", "--nodes", "4", "--dry-run"]) == 2
    assert "runs/first waits for its data, and is planned for 2 nodes" in capsys.readouterr().err
    assert main(["train", "runs/first", "--resume"]) == 2
    assert main(["verify", "runs/first"]) == 2
    assert "job 11 prepares it" in capsys.readouterr().err

    assert main(["prepare", "runs/first"]) == 0
    plan = open_run("first")
    assert plan.data is not None
    assert plan.num_steps == 6
    assert (plan.topology.num_nodes, plan.topology.processes_per_node, plan.topology.device) == (2, 2, "cpu")
    assert read_status(run).state == "prepared"
    assert (run / "data.json").is_file()

    capsys.readouterr()
    assert main(["submit", "runs/first", "--nodes", "4", "--time", "00:20:00", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --nodes=4\n" in shown
    assert "#SBATCH --time=00:20:00\n" in shown
    assert "prepare.sbatch" not in shown
    assert open_run("first") == plan, "a dry run changes nothing"


def test_rows_that_cannot_be_prepared_fail_the_run_and_its_name_is_free_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = waiting_run(folder, monkeypatch)
    (folder / "rows.jsonl").write_text('{"messages": 3}\n')
    assert main(["prepare", "runs/first"]) == 2
    now = read_status(run)
    assert now.state == "failed"
    assert now.message.startswith("its data could not be prepared: ")
    (folder / "rows.jsonl").write_text(f"{json.dumps(ONE_ROW)}\n" * 32)
    assert main(["submit", "tiny.yaml", "--dry-run"]) == 0


def test_memory_is_looked_at_before_a_job_is_sent(folder: Path, capsys) -> None:
    write_site(folder, gpus_per_node=8, cpus_per_node=None, gpu="L4")
    assert main(["prepare", "tiny.yaml"]) == 0
    words = ["submit", "tiny.yaml", "--nodes", "1", "--dry-run", "model.config.hidden_size=16384"]
    words += ["model.config.intermediate_size=65536", "model.config.num_hidden_layers=80"]
    words += ["model.config.num_attention_heads=128", "model.config.num_key_value_heads=8"]
    assert main(words) == 2
    assert "the run needs" in capsys.readouterr().err
    main([*words, "--force"])
    assert "the run needs" not in capsys.readouterr().err
