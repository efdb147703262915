"""Files that run code when they are unpickled, in every place where a file is read: none is ever opened as one."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.cli.main import main
from packhorse.data.packs.store import open_store
from packhorse.data.render.tokenizer import load_tokenizer
from packhorse.errors import UserError
from packhorse.model.load import ModelRequest, load_model, open_model
from packhorse.model.methods.adapter_files import with_adapter
from packhorse.quickstart.files import materialise
from packhorse.run_folder.checkpoints.listing import find_newest_sound
from packhorse.run_folder.checkpoints.manifest import (
    CheckpointManifest,
    FileRecord,
    RunFacts,
    checkpoint_faults,
    files_below,
    sha256_of,
)
from packhorse.run_folder.layout import MANIFEST_FILE
from packhorse.train.checkpoint.optimizer_state import load_states
from packhorse.train.checkpoint.resume_point import read_state
from packhorse.train.engine.engine import Engine
from packhorse.train.state import TrainState
from prepared import write_prepared
from saved_states import save_states
from tiny import write_tiny

VOCABULARY = 1024


class Evil:
    """Makes a file when it is unpickled; by `open`, so that no shell is needed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("CANARY", "w")


# A pickle ends where it says; after it, anything may follow: here what makes it whole numbers of 16 bits.
EVIL = pickle.dumps(Evil()).ljust(64, b"\0")
USUAL_NAMES = [
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt"),
    *("rng_state.pth", "random_states_0.pkl", "state.pkl", "mp_rank_00_model_states.pt", "data.pt", "optimizer-0.pt"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def canary(folder: Path) -> bool:
    return any(path.name == "CANARY" for path in folder.rglob("*"))


def test_the_canary_would_sing(here: Path) -> None:
    pickle.loads(EVIL).close()
    assert canary(here)


def made_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config)


def request(source: Path, trusted: bool = False) -> ModelRequest:
    return ModelRequest(
        source=str(source),
        revision=None,
        config=None,
        seed=0,
        dtype=torch.float32,
        attention="sdpa",
        quantization=None,
        trust_remote_code=trusted,
        device=torch.device("cpu"),
    )


def stepped(model: torch.nn.Module) -> Engine:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    accelerator: Any = SimpleNamespace(scaler=None, unwrap_model=lambda model: model)
    return Engine(accelerator, model, optimizer, gradient_factor=1.0, clip_norm=None, control=None)


def made_checkpoint(folder: Path) -> Path:
    checkpoint = folder / "step-000002"
    engine = stepped(made_model())
    engine.model.save_pretrained(checkpoint / "model")
    save_states(engine, checkpoint)
    (checkpoint / "state.json").write_text(json.dumps(asdict(TrainState(step=2))))
    for record in checkpoint.glob(".written-*"):  # of its writing; gone where a checkpoint is published
        record.unlink()
    return checkpoint


def read_all(checkpoint: Path) -> list[str]:
    """Every reader of a checkpoint, one after another; what each refused."""
    refused = []
    engine = stepped(made_model())
    readers: dict[str, Callable[[], object]] = {
        "state": lambda: read_state(checkpoint),
        "open": lambda: open_model(request(checkpoint / "model"), VOCABULARY),
        "load": lambda: load_model(request(checkpoint / "model"), VOCABULARY),
        "optimizer": lambda: load_states(engine, checkpoint),
    }
    for name, read in readers.items():
        try:
            read()
        except Exception:
            refused.append(name)
    return refused


def fit_manifest(checkpoint: Path) -> None:
    """A manifest that fits whatever stands there now, as one who put it there would write it."""
    files = {
        path.relative_to(checkpoint).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in files_below(checkpoint)
    }
    facts = RunFacts(step=2, engine="ddp", world_size=1, plan="", data="")
    manifest = CheckpointManifest(run=facts, files=files).sealed()
    (checkpoint / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n")
    assert list(checkpoint_faults(checkpoint)) == []


def test_no_file_of_a_checkpoint_is_unpickled_even_where_the_manifest_was_made_to_fit(here: Path) -> None:
    checkpoint = made_checkpoint(here / "checkpoints")
    fit_manifest(checkpoint)
    assert find_newest_sound(checkpoint.parent).checkpoint == checkpoint
    assert read_all(checkpoint) == []
    own = files_below(checkpoint)
    for path in own:
        content = path.read_bytes()
        path.write_bytes(EVIL)
        assert find_newest_sound(checkpoint.parent).checkpoint is None, "found by its hash"
        fit_manifest(checkpoint)
        refused = read_all(checkpoint)
        assert refused or path.name == "generation_config.json", path
        path.unlink()
        for name in USUAL_NAMES:
            (path.parent / name).write_bytes(EVIL)
        fit_manifest(checkpoint)
        read_all(checkpoint)
        assert not canary(here), path
        for name in USUAL_NAMES:
            (path.parent / name).unlink()
        path.write_bytes(content)
    assert not canary(here)


@pytest.mark.parametrize("read", [open_model, load_model], ids=["a unit at a time", "whole"])
@pytest.mark.parametrize("form", ["pickle", "torch.save", "under safetensors' name", "behind an index"])
def test_a_base_model_of_pickled_weights_is_refused(form: str, read: Callable[..., object], here: Path) -> None:
    folder = here / "model"
    made_model().config.save_pretrained(folder)
    if form == "torch.save":
        torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    elif form == "under safetensors' name":
        (folder / "model.safetensors").write_bytes(EVIL)
    else:
        (folder / "pytorch_model.bin").write_bytes(EVIL)
    if form == "behind an index":
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="safetensors"):
        read(request(folder), VOCABULARY)
    assert not canary(here)


def test_pickled_weights_are_refused_before_rows_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_model().config.save_pretrained(here / "model")
    (here / "model" / "pytorch_model.bin").write_bytes(EVIL)
    shutil.copytree(materialise("tokenizer", here / "builtin"), here / "model", dirs_exist_ok=True)
    write_tiny(here, model={"path": "model"}, data={"sources": [{"path": "not-there.jsonl"}]})
    assert main(["train", "tiny.yaml"]) == 2
    told = capsys.readouterr().err
    assert "model has its weights in pytorch_model.bin, and no safetensors" in told
    assert "not-there" not in told


def test_an_adapter_of_pickled_weights_is_refused(here: Path) -> None:
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    (here / "adapter" / "adapter_model.bin").write_bytes(EVIL)
    with pytest.raises(UserError, match=r"holds no adapter_model.safetensors"):
        with_adapter(made_model(), here / "adapter")
    assert not canary(here)


CODE = "open('CANARY', 'w').close()\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"


@pytest.mark.parametrize("read", [open_model, load_model], ids=["a unit at a time", "whole"])
def test_code_that_comes_with_a_model_runs_only_where_the_recipe_says_so(
    read: Callable[..., object], here: Path
) -> None:
    folder = here / "model"
    made_model().save_pretrained(folder)
    (folder / "code.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    # A type that transformers has is read by its own class; what the folder brings is not looked at.
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    read(request(folder), VOCABULARY)
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "strange"}))
    with pytest.raises(UserError, match=r"needs its own Python code, and model.trust_remote_code is false"):
        read(request(folder), VOCABULARY)
    assert not canary(here)


def test_plan_says_where_a_model_runs_code_of_its_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(here, model={"id": "org/model"})
    assert main(["plan", "tiny.yaml", "model.trust_remote_code=true"]) == 0
    assert "running the model's Python code" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "tiny.yaml"]) == 0
    assert "running the model's Python code" not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "x.pkl"])
def test_no_file_of_a_tokenizer_is_unpickled(name: str, here: Path) -> None:
    folder = here / "tokenizer"
    shutil.copytree(materialise("tokenizer", here / "builtin"), folder)
    (folder / name).write_bytes(EVIL)
    if name in ("tokenizer.json", "tokenizer_config.json"):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_tokenizer(folder, "tokenizer")
    else:
        load_tokenizer(folder, "tokenizer")
    assert not canary(here)


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "spm_file"])
@pytest.mark.parametrize("place", [".env", "../.env", "absolute"])
def test_a_tokenizer_that_names_a_file_elsewhere_is_refused(key: str, place: str, here: Path) -> None:
    """transformers #46279: the file would be read as a vocabulary, and a copy saved with the model."""
    folder = here / "inner" / "tokenizer"
    shutil.copytree(materialise("tokenizer", here / "builtin"), folder)
    for secret in (here / ".env", folder.parent / ".env"):
        secret.write_text("PASSWORD=1\n")
    value = str(here / ".env") if place == "absolute" else place
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {key: value}))
    with pytest.raises(UserError, match=f"sets {key} to {value}, a file outside that folder"):
        load_tokenizer(folder, "tokenizer")
    for harmless in ("/root/.cache/of/another/machine/tokenizer.json", "tokenizer.json", None):
        file.write_text(json.dumps(fields | {key: harmless}))
        load_tokenizer(folder, "tokenizer")


@pytest.mark.parametrize("name", ["rows.pkl", "rows.npy", "rows.pt", "rows.bin", "rows.pickle"])
def test_a_data_source_that_is_a_pickle_is_refused(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / name).write_bytes(EVIL)
    write_tiny(here, data={"sources": [{"path": name}]})
    assert main(["prepare", "tiny.yaml"]) == 2
    assert f"the data source {name} ends in {Path(name).suffix}" in capsys.readouterr().err
    assert not canary(here)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_pickle_under_the_name_of_rows_is_refused(
    ending: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / f"rows{ending}").write_bytes(EVIL)
    write_tiny(here, data={"sources": [{"path": f"rows{ending}"}]})
    assert main(["prepare", "tiny.yaml"]) == 2
    assert f"rows{ending}" in capsys.readouterr().err
    assert not canary(here)


def test_no_file_of_prepared_data_is_unpickled(here: Path) -> None:
    document = ([1, 2, 3, 4], [0, 0, 1, 1], {"text": "a"})
    folder = write_prepared(here / "data", {"train": [document]})
    for path in sorted((folder / "train").iterdir()):
        content = path.read_bytes()
        for evil in (EVIL, b"\x93NUMPY\x01\x00v\x00" + _header("|O") + EVIL):
            path.write_bytes(evil)
            if path.suffix == ".npy":
                with pytest.raises(UserError, match=f"{path.name} is not an array of numbers"):
                    open_store(folder, "train")
            else:
                open_store(folder, "train")  # bytes are bytes: `verify` says that they are others
        path.write_bytes(content)
    assert not canary(here)


def _header(kind: str) -> bytes:
    """Of a .npy file; with `|O` numpy would unpickle what follows, if it were allowed to."""
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': (1,), }}".encode().ljust(117) + b"\n"


def test_pickles_are_not_written_either(here: Path) -> None:
    """A zip of torch.save and a pickle begin with these bytes; none of a checkpoint's files does."""
    checkpoint = made_checkpoint(here)
    heads = {path.name: path.read_bytes()[:2] for path in files_below(checkpoint)}
    assert heads
    assert not {name for name, head in heads.items() if head in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")}
    assert "optimizer.json" in heads
