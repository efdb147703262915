"""What the worker would refuse, refused by `check`, `plan` and `submit` from files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from packhorse.cli.main import main
from packhorse.quickstart.files import VOCABULARY_SIZE, materialise
from tiny import TINY, write_tiny

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
COMMANDS = (
    ["check", "tiny.yaml"],
    ["plan", "tiny.yaml"],
    ["submit", "tiny.yaml", "--site", "site.yaml", "--dry-run"],
)
LORA = {"kind": "lora", "rank": 2}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a site and the smallest Llama on disk, written by hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("name: here\ngpus_per_node: 1\n")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in materialise("tokenizer", tmp_path / "builtin").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(SIZES))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY_SIZE, 16)}
    for layer in range(2):
        inside = {
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (VOCABULARY_SIZE, 16)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    return tmp_path


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**SIZES, **changes})) and None


def stored(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def incomplete(folder: Path) -> None:
    files = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def fresh(**config: Any) -> dict[str, Any]:
    return {"method": "full", "model": {**TINY["model"], "config": {**TINY["model"]["config"], **config}}}


Q = "model.layers.1.self_attn.q_proj.weight"
# sections of the recipe, change of the model's folder, fact, fix
CASES: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, str, str]] = {
    "config key": (fresh(hiden_size=64), None, "model.config.hiden_size is not a field", "`model.config.hidden_size`"),
    "fresh vocabulary": (
        fresh(vocab_size=512),
        None,
        f"the model has 512 embeddings and the tokenizer {VOCABULARY_SIZE} tokens",
        f"set model.config.vocab_size to {VOCABULARY_SIZE}",
    ),
    "new tokens": (
        {
            **fresh(vocab_size=VOCABULARY_SIZE),
            "model": {**fresh(vocab_size=VOCABULARY_SIZE)["model"], "new_tokens": ["<a>"]},
        },
        None,
        f"the model has {VOCABULARY_SIZE} embeddings and the tokenizer {VOCABULARY_SIZE + 1} tokens",
        f"set model.config.vocab_size to {VOCABULARY_SIZE + 1}",
    ),
    "seed": ({"seed": -1}, None, "seed is -1", "write `seed: 0`"),
    "target": (
        {"method": {**LORA, "target": ["q_porj", "v_proj"]}},
        None,
        "method.target has q_porj",
        "to [q_proj, v_proj]",
    ),
    "target of a block": (
        {"method": {**LORA, "target": ["mlp"]}},
        None,
        "method.target has mlp",
        "set method.target to",
    ),
    "head": (
        {"method": {**LORA, "target": ["lm_head"]}},
        None,
        "method.target names lm_head",
        "method.train_also: [lm_head]",
    ),
    "whole": ({"method": {**LORA, "train_also": ["lm_haed"]}}, None, "method.train_also has lm_haed", "lm_head"),
    "whole, quantised": (
        {"method": {"kind": "qlora", "train_also": ["q_proj"]}},
        None,
        "whose weights are quantised (model.layers.0.self_attn.q_proj.weight)",
        "set method.train_also to []",
    ),
    "half of a tie": (
        {"method": {**LORA, "train_also": ["lm_head"]}},
        configured(tie_word_embeddings=True),
        "which this model ties to model.embed_tokens",
        "set method.train_also to [lm_head, embed_tokens]",
    ),
    "experts": (
        {"method": {**LORA, "experts": True, "dropout": 0}},
        None,
        "no fused expert weights",
        "remove method.experts",
    ),
    "ia3": ({"method": {"kind": "ia3", "target": ["w2"]}}, None, "method.target has w2", "the nearest names are"),
    "layers": (
        {"method": {"kind": "partial", "last_layers": 3}},
        None,
        "the model has 2 layers",
        "set method.last_layers to 2",
    ),
    "pattern": (
        {"method": {"kind": "partial", "train": ["*.mpl.*"]}},
        None,
        "method.train has *.mpl.*",
        "nearest names",
    ),
    "loftq": (
        {"method": {"kind": "qlora", "initialization": "loftq"}},
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no .safetensors file",
        "method.initialization: default",
    ),
    "missing weight": ({}, stored(lambda tensors: tensors.pop(Q)), f"lacks {Q}", "choose a checkpoint"),
    "unknown weight": (
        {},
        stored(lambda t: t.update(extra=t[Q])),
        "holds extra, which the model does not have",
        "choose",
    ),
    "other shape": ({}, configured(intermediate_size=32), "is [16, 24] in the checkpoint", "fix its config.json"),
    "cut off": ({}, cut_off, "are not safetensors: model.safetensors", "download the model again"),
    "pickle": ({}, pickled, "has its weights in pytorch_model.bin", "save_pretrained writes safetensors"),
    "missing file": ({}, incomplete, "lacks model-2.safetensors, one of 2 files", "download the model again"),
    "own code": (
        {},
        configured(model_type="own", auto_map={}),
        "needs its own Python code",
        "model.trust_remote_code: true",
    ),
    "unknown type": ({}, configured(model_type="own"), "has model_type own", "set model.id or model.path"),
    "softcap": ({}, configured(attn_logit_softcapping=50.0), "attention uses softcap", "choose a model without it"),
    "dropout": (
        {"model": {"path": "model", "attention": "varlen"}, "precision": "bf16"},
        configured(attention_dropout=0.1),
        "attention_dropout is 0.1",
        "set model.attention to sdpa",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_check_plan_and_submit(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections, change, fact, fix = CASES[name]
    write_tiny(here, **{"model": {"path": "model"}, "method": LORA, **sections})
    if change is not None:
        change(here / "model")
    for words in COMMANDS:
        on_gpus = ["--gpus", "1"] if name == "dropout" and words[0] == "plan" else []
        assert main([*words, *on_gpus]) == 2
        told = capsys.readouterr().err
        assert fact in told, f"{words[0]}: {told}"
        assert fix in told.partition("  fix: ")[2], f"{words[0]}: {told}"
    assert not (here / "runs").exists() or not list((here / "runs").glob("[!.]*"))


GOOD: dict[str, dict[str, Any]] = {
    "adapter": {"method": {**LORA, "target": ["q_proj", "embed_tokens"], "train_also": ["lm_head"]}},
    "whole": {"method": "full"},
    "patterns": {"method": {"kind": "partial", "last_layers": 1, "train": ["lm_head.*"]}},
    "more embeddings than tokens": fresh(vocab_size=VOCABULARY_SIZE + 290),
    "new rows": {"model": {"path": "model", "new_tokens": ["<a>"]}},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_trained_is_not_refused(name: str, here: Path) -> None:
    write_tiny(here, **{"model": {"path": "model"}, "method": LORA, **GOOD[name]})
    for words in COMMANDS:
        assert main(words) == 0, words[0]


IN_CHECK: dict[str, tuple[dict[str, Any], str]] = {
    "pair": (
        {"optimizer": {"name": "muon", "learning_rate": 1e-3}, "parallel": {"engine": "zero2", "processes": 2}},
        "is muon",
    ),
    "warm-up of the epochs": (
        {"steps": None, "epochs": 1, "schedule": {"name": "constant", "warmup_steps": 500}},
        "schedule.warmup_steps is 500, and 1 epochs are",
    ),
    "field of the table": ({"evaluation": {"group_by": "lanugage"}}, "evaluation.group_by is lanugage"),
    "no model": ({"model": {"path": "nowhere", "tokenizer": "builtin:tokenizer"}}, "model.path nowhere does not exist"),
    "passes": (
        {
            "batch": {"length": 256, "packs": 8, "micro": 2},
            "parallel": {"engine": "single", "processes": 1},
            "optimizer": {"learning_rate": 1e-3, "in_backward": True, "clip_norm": None},
        },
        "a step has 4 backward passes",
    ),
}


@pytest.mark.parametrize("name", IN_CHECK)
def test_check_refuses_what_plan_and_prepare_refuse(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections, fact = IN_CHECK[name]
    write_tiny(here, **sections)
    assert main(["check", "tiny.yaml"]) == 2
    assert fact in capsys.readouterr().err


def test_what_needs_a_gpu_passes_check_on_a_machine_without_one(here: Path) -> None:
    write_tiny(here, model={"path": "model", "attention": "varlen"}, method=LORA, precision="bf16")
    assert main(["check", "tiny.yaml"]) == 0


def test_a_real_tokenizer_beside_a_small_model_and_its_own_family(here: Path, shared: Path) -> None:
    """151,646 ids need at least as many embeddings; models of this family have 151,936."""
    tokenizer = str(shared / "tokenizers" / "qwen2-151k")
    write_tiny(here, model={"path": str(shared / "models" / "stories260K-llama"), "tokenizer": tokenizer}, method=LORA)
    assert main(["plan", "tiny.yaml"]) == 2
    configured(vocab_size=151_936)(here / "model")
    (here / "model" / "model.safetensors").unlink()
    write_tiny(here, model={"path": "model", "tokenizer": tokenizer}, method=LORA)
    assert main(["plan", "tiny.yaml"]) == 0
