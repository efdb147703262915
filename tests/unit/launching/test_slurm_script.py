"""Job scripts: golden text, and no value that ends the #SBATCH block or is run."""

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
    command_script,
    cpu_request,
    quoted,
    site_lines,
    train_request,
    train_script,
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
    return train_script(site, train_request(site, "first", LOGS, 2, site.gpus_per_node, site.time, 240), programs)


def block(text: str) -> list[str]:
    """What Slurm reads: it stops at the first line that is neither empty nor a comment."""
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
def test_every_directive_is_one_word_and_all_stand_before_the_first_command(name: str) -> None:
    site = load_site(name)
    for text in (train_of(site), command_script(site, cpu_request(site, "first", LOGS, "prepare"), None)):
        assert [line for line in block(text) if " " in line or not line.startswith("--")] == []
        assert len(block(text)) == text.count("\n#SBATCH ")
        checked = subprocess.run([shutil.which("bash"), "-n"], input=text, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_what_a_job_asks_for() -> None:
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


def test_jobs_without_gpus_ask_for_none_and_stand_where_the_site_says() -> None:
    site = load_site("university")
    asked = block(command_script(site, cpu_request(site, "first", LOGS, "prepare"), None))
    assert not [word for word in asked if "gpu" in word or "constraint" in word]
    assert {"--partition=standard", "--qos=short", "--cpus-per-task=16", "--mem=32768M"} <= {*asked}


def test_nodes_without_gpus() -> None:
    site = SiteProfile(name="plain", gpus_per_node=0, cpus_per_node=4)
    asked = block(train_script(site, train_request(site, "first", LOGS, 2, 0, "00:10:00", 180), None))
    assert "--cpus-per-task=4" in asked
    assert not [word for word in asked if "gpu" in word or "gres" in word]


@pytest.mark.parametrize("value", NASTY, ids=ascii)
def test_text_of_the_site_reaches_the_job_as_it_is(value: str, tmp_path: Path) -> None:
    site = SiteProfile(name="nasty", environment={"GIVEN": value}, container=["run", value])
    text = train_of(site)
    between = text[text.index(SITE_BEGINS) : text.rindex(SITE_ENDS)]
    shown = bash(f'set -u\n{between}\nprintf "%s\\n" "$GIVEN" "${{container[@]}}"', tmp_path)
    assert shown == f"{value}\nrun\n{value}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [value for value in NASTY if value], ids=ascii)
def test_and_the_folder_of_our_programs(value: str, tmp_path: Path) -> None:
    lines = "\n".join(site_lines(SiteProfile(name="nasty"), f"/opt/{value}/bin", trains=True))
    assert bash(f'{lines}\necho "${{PATH%%:*}}"', tmp_path) == f"/opt/{value}/bin\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reference_becomes_the_variable_of_the_job_and_nothing_else_is_expanded(tmp_path: Path) -> None:
    site = SiteProfile(
        name="here", scratch="${env:TMPDIR}/mine", environment={"X": "$HOME ${env:HOME} ${HOME}"}, container=[]
    )
    lines = "\n".join(site_lines(site, None, trains=True))
    assert bash(f'set -u\n{lines}\necho "$scratch,$X"', tmp_path) == "/node/tmp/mine,$HOME /home/me ${HOME}\n"


@pytest.mark.parametrize("name", ["a b", "a\nb", "-x", "$(id)", "", "a\n#SBATCH --uid=0"], ids=ascii)
def test_a_name_that_would_break_the_block_is_refused(name: str) -> None:
    site = load_site("cloud")
    with pytest.raises(UserError, match="the name of the job"):
        train_script(site, replace(train_request(site, "x", LOGS, 1, 8, site.time, 180), name=name), None)


@pytest.mark.parametrize("folder", ["/a b", "/a\nb", "/a%j", "/$(id)", "/a'b", "relative"], ids=ascii)
def test_and_so_is_the_path_of_a_run(folder: str) -> None:
    site = load_site("cloud")
    with pytest.raises(UserError, match="set runs_folder to"):
        train_script(site, train_request(site, "x", Path(folder) / "logs", 1, 8, site.time, 180), None)


def test_all_but_the_block_and_the_site_stands_as_it_is_shipped() -> None:
    one, other = train_of(load_site("cloud")), train_of(load_site("university"))
    assert one[one.index(SITE_ENDS) :] == other[other.index(SITE_ENDS) :]


def test_quoted_is_plain_where_nothing_needs_it() -> None:
    assert quoted("/shared/x.sif") == "/shared/x.sif"
    assert quoted("") == "''"
