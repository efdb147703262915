"""Job scripts: no value ends the #SBATCH block or is executed; the lead of the signal."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.launching.slurm.script import (
    SITE_BEGINS,
    SITE_ENDS,
    cpu_request,
    job_script,
    quoted,
    signal_lead,
    site_lines,
    train_request,
)
from packhorse.launching.slurm.site import SiteProfile, load_site, shipped_sites

LOGS = Path("/shared/runs/first/logs")
NASTY = [
    "a b",
    "$(touch canary)",
    "`touch canary`",
    "; touch canary",
    "a'b",
    'a"b',
    "'; touch canary; '",
    '"; touch canary; "',
    "a\\",
    "\\",
    "$HOME",
    "${HOME}",
    "!!",
    "*",
    "~",
    "-n",
    "a) ; touch canary ; b=(",
    "& touch canary &",
    "| touch canary",
    "> canary",
    "#a",
    "# --- end of site ---",
    "",
    "é ☃",
]


def train_of(site: SiteProfile, programs: str = "/shared/packhorse/.venv/bin") -> str:
    return job_script(site, train_request(site, "first", LOGS, 2, site.gpus_per_node, site.time, 240), programs)


def block(text: str) -> list[str]:
    """Return the directives that Slurm reads: up to the first line that is neither empty nor a comment."""
    lines = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            lines.append(line.removeprefix("#SBATCH ").partition(" #")[0].rstrip())
    return lines


def bash(text: str, folder: Path) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/me", "TMPDIR": "/node/tmp"}
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, cwd=folder, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("name", shipped_sites())
def test_every_directive_is_one_word_before_the_first_command(name: str) -> None:
    site = load_site(name)
    for text in (train_of(site), job_script(site, cpu_request(site, "first", LOGS, "prepare"), None)):
        assert [line for line in block(text) if " " in line or not line.startswith("--")] == []
        assert len(block(text)) == text.count("\n#SBATCH ")
        checked = subprocess.run([shutil.which("bash"), "-n"], input=text, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_resources_of_a_job() -> None:
    asked = block(train_of(load_site("cloud")))
    for word in ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:h100:8", "--cpus-per-task=192", "--mem=1966080M"):
        assert word in asked
    for word in ("--signal=B:USR1@240", "--requeue", "--open-mode=append", "--exclusive"):
        assert word in asked
    assert f"--output={LOGS}/job-%j.out" in asked
    asked = block(train_of(load_site("university")))
    for word in ("--account=ab1234", "--qos=normal", "--constraint=a100&ib", "--gpus-per-node=a100:4"):
        assert word in asked
    assert "--mail-type=END,FAIL" in asked
    assert "--no-requeue" in block(train_of(load_site("container")))


def test_jobs_without_gpus_request_none_in_the_partition_of_the_site() -> None:
    site = load_site("university")
    asked = block(job_script(site, cpu_request(site, "first", LOGS, "prepare"), None))
    assert not [word for word in asked if "gpu" in word or "constraint" in word]
    assert {"--partition=standard", "--qos=short", "--cpus-per-task=16", "--mem=32768M"} <= {*asked}


def test_nodes_without_gpus() -> None:
    site = SiteProfile(name="plain", gpus_per_node=0, cpus_per_node=4)
    asked = block(job_script(site, train_request(site, "first", LOGS, 2, 0, "00:10:00", 180), None))
    assert "--cpus-per-task=4" in asked
    assert not [word for word in asked if "gpu" in word or "gres" in word]


@pytest.mark.parametrize("value", NASTY, ids=ascii)
def test_text_of_the_site_reaches_the_job_unchanged(value: str, tmp_path: Path) -> None:
    site = SiteProfile(name="nasty", environment={"GIVEN": value}, container=["run", value])
    text = train_of(site)
    between = text[text.index(SITE_BEGINS) : text.rindex(SITE_ENDS)]
    shown = bash(f'set -u\n{between}\nprintf "%s\\n" "$GIVEN" "${{container[@]}}"', tmp_path)
    assert shown == f"{value}\nrun\n{value}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [value for value in NASTY if value], ids=ascii)
def test_the_folder_of_programs_reaches_the_job_unchanged(value: str, tmp_path: Path) -> None:
    lines = "\n".join(site_lines(SiteProfile(name="nasty"), f"/opt/{value}/bin", trains=True))
    assert bash(f'{lines}\necho "${{PATH%%:*}}"', tmp_path) == f"/opt/{value}/bin\n"
    assert list(tmp_path.iterdir()) == []


def test_only_references_to_variables_are_expanded(tmp_path: Path) -> None:
    site = SiteProfile(
        name="here", scratch="${env:TMPDIR}/mine", environment={"X": "$HOME ${env:HOME} ${HOME}"}, container=[]
    )
    lines = "\n".join(site_lines(site, None, trains=True))
    assert bash(f'set -u\n{lines}\necho "$scratch,$X"', tmp_path) == "/node/tmp/mine,$HOME /home/me ${HOME}\n"


@pytest.mark.parametrize("name", ["a b", "a\nb", "-x", "$(id)", "", "a\n#SBATCH --uid=0"], ids=ascii)
def test_a_name_that_would_break_the_block_is_refused(name: str) -> None:
    site = load_site("cloud")
    with pytest.raises(UserError, match="the name of the job"):
        job_script(site, replace(train_request(site, "x", LOGS, 1, 8, site.time, 180), name=name), None)


@pytest.mark.parametrize("folder", ["/a b", "/a\nb", "/a%j", "/$(id)", "/a'b", "relative"], ids=ascii)
def test_a_path_that_would_break_the_block_is_refused(folder: str) -> None:
    site = load_site("cloud")
    with pytest.raises(UserError, match="set runs_folder to"):
        job_script(site, train_request(site, "x", Path(folder) / "logs", 1, 8, site.time, 180), None)


def test_everything_after_the_site_is_as_shipped() -> None:
    one, other = train_of(load_site("cloud")), train_of(load_site("university"))
    assert one[one.index(SITE_ENDS) :] == other[other.index(SITE_ENDS) :]


def test_plain_words_are_not_quoted() -> None:
    assert quoted("/shared/x.sif") == "/shared/x.sif"
    assert quoted("") == "''"


def test_short_steps_get_the_least_lead() -> None:
    lead = signal_lead([], None, None)
    assert lead.seconds == 180
    assert lead.reason == "the duration of a step and a save is unknown, 120 s at least, plus 60 s to exit"


def test_the_longest_measured_step_and_save_count() -> None:
    lines = [
        {"step": 1, "speed/step_seconds": 30.0},
        {"step": 2, "speed/step_seconds": 45.0, "checkpoint/seconds": 500.0},
        {"step": 3, "speed/step_seconds": 20.0, "checkpoint/seconds": 400.5},
    ]
    lead = signal_lead(lines, 1.0, 10**9)
    assert lead.seconds == 45 + 500 + 60
    assert lead.reason == "a step of 45.0 s and a save of 500.0 s were measured, plus 60 s to exit"


def test_without_a_measured_save_the_checkpoint_size_counts() -> None:
    # A checkpoint of an 8B model with Adam in float32 is 96 GB: eight minutes at 200 MB/s.
    lead = signal_lead([], 20.0, 96 * 10**9)
    assert lead.seconds == 20 + 480 + 60
    assert "expected" in lead.reason
