"""Site profiles: shipped ones load; every mistake has its file and line; hostile values are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from packhorse.errors import UserError
from packhorse.launching.slurm.site import CpuJobs, SiteProfile, mebibytes_of, seconds_of
from packhorse.launching.slurm.site_load import load_site, shipped_sites

CANARY = "/tmp/never"
HOSTILE = [
    "a b",
    "a\nb",
    "a\n#SBATCH --uid=0",
    "-x",
    "--wrap=id",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"a;touch {CANARY}",
    'a"b',
    "a'b",
    "a\\b",
    "",
    "\u2028a",
    "a#b",
]
# Fields whose values become part of a #SBATCH line.
IN_THE_BLOCK = [
    "account",
    "partition",
    "qos",
    "constraint",
    "gpu_type",
    "memory_per_gpu",
    "time",
    "longest_time",
    "mail",
    "network_interface",
    "scratch",
    "programs",
]


def write(folder: Path, **fields: object) -> str:
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({"name": "here", **fields}, allow_unicode=True), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", shipped_sites())
def test_shipped_profiles_load_and_are_read_back_from_a_run_folder(name: str) -> None:
    site = load_site(name)
    assert site.name == name
    assert SiteProfile.model_validate_json(site.model_dump_json()) == site


def test_three_kinds_of_cluster_are_shipped() -> None:
    assert shipped_sites() == ["cloud", "container", "university"]


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
@pytest.mark.parametrize("field", IN_THE_BLOCK)
def test_a_value_that_could_end_the_block_is_refused(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"my.yaml:\d+: {field} is "):
        load_site(write(tmp_path, **{field: value}))


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
@pytest.mark.parametrize("field", ["modules", "options", "shared"])
def test_an_item_of_a_list_that_could_end_the_block_is_refused(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"my.yaml:\d+: {field}(.0 is| holds) "):
        load_site(write(tmp_path, **{field: [value]}))


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_hostile_name_of_a_variable_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names of variables"):
        load_site(write(tmp_path, environment={value: "1"}))


@pytest.mark.parametrize("field", ["environment", "container"])
def test_a_line_break_in_text_is_refused(field: str, tmp_path: Path) -> None:
    value = {"A": "x\ny"} if field == "environment" else ["x\ny"]
    with pytest.raises(UserError, match=rf"{field}.* text on one line"):
        load_site(write(tmp_path, **{field: value}))


def test_one_error_lists_all_mistakes_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "nam: x\npartition: a b\ngpus_per_node: many\ncpu_jobs: {cpus: 0, tim: 1}\ngpus_asked_by: gre\nmodules: cuda\n"
    )
    with pytest.raises(UserError) as raised:
        load_site(str(path))
    mistakes = {(mistake.where.rpartition(":")[2], mistake.fact) for mistake in raised.value.mistakes}
    assert mistakes == {
        ("1", "name is missing."),
        ("1", "nam is not a field of a site profile."),
        ("2", "partition is 'a b'; it takes a name of letters, digits, `.`, `_`, `-`."),
        ("3", "gpus_per_node is 'many'; it takes a whole number from 0 to 64."),
        ("4", "cpu_jobs.cpus is '0'; it takes a whole number above 0."),
        ("4", "cpu_jobs.tim is not a field of a site profile."),
        ("5", "gpus_asked_by is 'gre'; it takes one of gpus-per-node, gres."),
        ("6", "modules is 'cuda'; it takes a list."),
    }
    assert next(mistake.fix for mistake in raised.value.mistakes if "nam " in mistake.fact) == "write `name`."


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"options": ["--nodes=3"]}, "options holds --nodes=3"),
        ({"options": ["--output=/etc/passwd"]}, "options holds --output"),
        ({"environment": {"SLURM_NNODES": "9"}}, "environment sets SLURM_NNODES"),
        ({"environment": {"PACKHORSE_ATTEMPT": "9"}}, "environment sets PACKHORSE_ATTEMPT"),
        ({"memory_per_gpu": "1G", "memory_per_node": "1G"}, "memory_per_gpu and memory_per_node"),
        ({"cpus_per_node": 4}, "cpus_per_node is for nodes without GPUs"),
        ({"time": "10:00:00", "longest_time": "09:59:59"}, "more than longest_time"),
        ({"container": ["apptainer"], "programs": "/opt/bin"}, "programs .* container"),
        ({"environment": {"X": "hf_" + "A" * 34}}, "Hugging Face token"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_conflicting_fields_are_refused(fields: dict[str, object], fact: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fact):
        load_site(write(tmp_path, **fields))


def test_without_a_profile_the_message_names_packhorse_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="packhorse site"):
        load_site(None)
    with pytest.raises(UserError, match="write --site university"):
        load_site("universty")
    write(tmp_path)
    (tmp_path / "my.yaml").rename("site.yaml")
    assert load_site(None).name == "here"


def test_units() -> None:
    assert seconds_of("1-02:03:04") == 93784
    assert seconds_of("00:10:00") == 600
    assert [mebibytes_of(text) for text in ("64G", "1T", "1025K", "5M")] == [65536, 2**20, 2, 5]


def test_the_documentation_lists_every_field() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "slurm.md").read_text(encoding="utf-8")
    fields = {**SiteProfile.model_fields, **{f"cpu_jobs.{name}": field for name, field in CpuJobs.model_fields.items()}}
    assert [name for name, field in fields.items() if f"| `{name}` | {field.description} |\n" not in page] == []
