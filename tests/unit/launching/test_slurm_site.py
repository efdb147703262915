"""Site profiles: what is shipped loads; every mistake is told by file and line; nothing hostile gets through."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from packhorse.errors import UserError
from packhorse.launching.slurm.site import CpuJobs, SiteProfile, load_site, mebibytes_of, seconds_of, shipped_sites

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
# Fields whose values stand in a #SBATCH line, or in a list of them.
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
def test_a_value_that_could_end_the_block_is_refused_by_name(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"my.yaml:\d+: {field} is "):
        load_site(write(tmp_path, **{field: value}))


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
@pytest.mark.parametrize("field", ["modules", "options", "shared"])
def test_and_so_is_an_item_of_a_list(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"my.yaml:\d+: {field}(.0 is| contains) "):
        load_site(write(tmp_path, **{field: [value]}))


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_and_the_name_of_a_variable(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names of variables"):
        load_site(write(tmp_path, environment={value: "1"}))


@pytest.mark.parametrize("field", ["environment", "container"])
def test_a_line_break_in_text_is_refused(field: str, tmp_path: Path) -> None:
    value = {"A": "x\ny"} if field == "environment" else ["x\ny"]
    with pytest.raises(UserError, match=rf"{field}.* text on one line"):
        load_site(write(tmp_path, **{field: value}))


def test_all_mistakes_are_reported_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "nam: x\npartition: a b\ngpus_per_node: many\ncpu_jobs: {cpus: 0, tim: 1}\ngpus_asked_by: gre\nmodules: cuda\n"
    )
    with pytest.raises(UserError) as raised:
        load_site(str(path))
    told = {(mistake.where.rpartition(":")[2], mistake.fact) for mistake in raised.value.mistakes}
    assert told == {
        ("1", "nam is not a field of a site profile."),
        ("2", "partition is a b (text); it takes a name of letters, digits, `.`, `_`, `-` or null."),
        ("3", "gpus_per_node is many (text); it takes a whole number from 0 to 64."),
        ("4", "cpu_jobs.cpus is 0; it takes a whole number above 0."),
        ("4", "cpu_jobs.tim is not a field of cpu_jobs."),
        ("5", "gpus_asked_by is gre (text); it takes one of gpus-per-node, gres."),
        ("6", "modules is cuda (text); it takes a list of texts."),
    }
    assert next(each.fix for each in raised.value.mistakes if "nam " in each.fact) == "write `name`."


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": ["--nodes=3"]}, "options contains --nodes=3"),
        ({"options": ["--output=/etc/passwd"]}, "options contains --output"),
        ({"environment": {"SLURM_NNODES": "9"}}, "environment sets SLURM_NNODES"),
        ({"environment": {"PACKHORSE_ATTEMPT": "9"}}, "environment sets PACKHORSE_ATTEMPT"),
        ({"memory_per_gpu": "1G", "memory_per_node": "1G"}, "memory_per_gpu and memory_per_node"),
        ({"cpus_per_node": 4}, "cpus_per_node is given, and gpus_per_node is 8"),
        ({"time": "10:00:00", "longest_time": "09:59:59"}, "more than longest_time"),
        ({"container": ["apptainer"], "programs": "/opt/bin"}, "programs .* container"),
        ({"environment": {"X": "hf_" + "A" * 34}}, "Hugging Face token"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_site(write(tmp_path, **fields))


def test_no_profile_says_how_to_write_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_documentation_has_every_field_in_its_own_words() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "slurm.md").read_text(encoding="utf-8")
    fields = {**SiteProfile.model_fields, **{f"cpu_jobs.{name}": each for name, each in CpuJobs.model_fields.items()}}
    assert [name for name, each in fields.items() if f"| `{name}` | {each.description} |\n" not in page] == []
