"""Profiles of GPUs: what is shipped, what is typed, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.estimate.gpus import OWN_FILE, OWN_VARIABLE, find_gpu, gpu_of_device, known_gpus, parse_gpus


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(OWN_VARIABLE, raising=False)


def test_the_shipped_cards_are_there_and_make_sense() -> None:
    gpus = known_gpus()
    wanted = {"H100-80GB", "H100-PCIE-80GB", "H200-141GB", "B200-180GB", "A100-40GB", "A100-80GB", "A100-PCIE-40GB"}
    wanted |= {"A100-PCIE-80GB", "L40S-48GB", "A10-24GB", "L4-24GB", "RTX-3090-24GB", "RTX-4090-24GB"}
    wanted |= {"RTX-5090-32GB", "MI300X-192GB", "V100-16GB", "V100-32GB", "T4-16GB"}
    assert set(gpus) == wanted
    for name, gpu in gpus.items():
        gigabytes = int(name.rsplit("-", 1)[1].removesuffix("GB"))
        # A card's name rounds: an L40S shows 45 GiB, an H200 140.4 of its 141 GB.
        assert 0.93 < gpu.memory_bytes / (gigabytes * 1e9) < 1.08
        # Before Ampere there is neither bf16 nor TF32: float32 takes their place.
        old = gpu.compute_capability is not None and gpu.compute_capability < 8
        assert gpu.fp32_tflops <= gpu.tf32_tflops <= gpu.bf16_tflops <= gpu.fp16_tflops
        assert gpu.bf16_tflops == (gpu.fp32_tflops if old else gpu.fp16_tflops)
        assert gpu.pcie_gb <= gpu.link_gb
        assert (gpu.link == "pcie") == (gpu.link_gb == gpu.pcie_gb)


def test_names_and_aliases_are_each_of_one_card() -> None:
    spoken = [word.lower() for gpu in known_gpus().values() for word in (gpu.name, *gpu.aliases)]
    assert len(spoken) == len(set(spoken))
    assert all(find_gpu(word) for word in spoken)


@pytest.mark.parametrize(
    ("typed", "count", "name"),
    [
        ("8", 8, None),
        ("8xH100-80GB", 8, "H100-80GB"),
        ("16 x h100", 16, "H100-80GB"),
        ("a100_pcie", 1, "A100-PCIE-40GB"),
        ("2xRTX 4090", 2, "RTX-4090-24GB"),
        ("3090", 1, "RTX-3090-24GB"),
        ("2×3090", 2, "RTX-3090-24GB"),
    ],
)
def test_what_is_typed(typed: str, count: int, name: str | None) -> None:
    found, gpu = parse_gpus(typed)
    assert (found, gpu and gpu.name) == (count, name)


@pytest.mark.parametrize("typed", ["", "0", "0xH100", "x", "-8"])
def test_a_wrong_request_is_refused_with_an_example(typed: str) -> None:
    with pytest.raises(UserError, match=r"8xH100-80GB|no GPU is called"):
        parse_gpus(typed)


def test_an_unknown_card_names_the_closest() -> None:
    with pytest.raises(UserError, match="no GPU is called 'H1000'") as raised:
        parse_gpus("8xH1000")
    assert "the closest: H100-80GB" in str(raised.value)
    with pytest.raises(UserError, match="PACKHORSE_GPUS"):
        find_gpu("abacus")


def test_nvidia_smi_names_are_known() -> None:
    found = gpu_of_device("NVIDIA A100-SXM4-40GB")
    assert found is not None
    assert found.name == "A100-40GB"
    assert gpu_of_device("NVIDIA GeForce GTX 1080") is None


def test_a_user_file_adds_and_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "H100-96GB:\n  extends: H100-80GB\n  memory_mib: 97871\n  bandwidth_gb: 2400\nL4-24GB:\n  extends: A10-24GB\n"
    Path(OWN_FILE).write_text(own)
    _, ours = parse_gpus("8xH100-96GB")
    assert ours is not None
    assert (ours.memory_mib, ours.bandwidth_gb, ours.bf16_tflops) == (97871, 2400, 989.4)
    assert find_gpu("L4-24GB").bf16_tflops == 125
    elsewhere = tmp_path / "cards.yaml"
    elsewhere.write_text(own.replace("H100-96GB", "H100-94GB"))
    monkeypatch.setenv(OWN_VARIABLE, str(elsewhere))
    assert find_gpu("H100-94GB").memory_mib == 97871
    with pytest.raises(UserError):
        find_gpu("H100-96GB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mine:\n  memory_mib: 100\n", "Mine.bf16_tflops is missing"),
        ("Mine:\n  extends: H100-80GB\n  memory: 100\n", "Mine.memory is not a field of a GPU profile"),
        ("Mine:\n  extends: H100-80GB\n  matmul_share: 80\n", "Mine.matmul_share is 80"),
        ("Mine:\n  extends: Yours\n", "extends 'Yours'"),
        ("Mine:\n  extends: Mine\n", "extends 'Mine'"),
        ("- Mine\n", "contains a list"),
        ("Mine: [\n", "not YAML"),
    ],
)
def test_a_wrong_user_file_is_refused(text: str, message: str) -> None:
    Path(OWN_FILE).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        find_gpu("Mine")
    assert OWN_FILE in str(raised.value)


def test_a_named_file_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_VARIABLE, "nowhere.yaml")
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        known_gpus()
