"""Families beside Llama: what each has of its own is trained right, packed, on every engine, and read back.

qwen2        biases on queries, keys and values; the head tied to the embedding
mixtral      a mixture of experts, of which a token takes two: with one, their weights would sum to 1 whatever the
             router says, and it would have no gradient
qwen3 moe    another, with norms on heads and head width of its own
gemma        scaled embeddings, tied, one head of keys and values, norms around 1
gemma3       layers that look back 16 tokens and layers that look back to the start
phi3         queries, keys and values in one layer; gate and up in another
llama        grouped queries
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from committed import committed_curve, fingerprint
from laboratory import COMMON, EVERY_ROW, PACKS, Laboratory
from peft import PeftModel
from test_packing import documents, model_pair, packed
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cli import curve
from golden import LORA, SEED, Curve, Method, Start, adamw, mean_loss, trajectory
from packhorse.model.methods.attach import Start as AdapterStart
from packhorse.model.methods.attach import attach
from packhorse.quickstart.files import materialise
from packhorse.recipe.methods import LoraMethod
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.objectives.token_loss import install_loss_head
from ranks import trained

NUM_STEPS = 6
LENGTH = 128
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 16, "num_experts_per_tok": 2},
    "qwen3 moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma": {"model_type": "gemma", **SIZES, "head_dim": 16, "num_key_value_heads": 1},
    "gemma3": {
        "model_type": "gemma3_text",
        **SIZES,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"model_type": "phi3", **SIZES, "pad_token_id": 0},
}
METHODS = {"full": 2e-3, "lora": 1e-2}
ENGINES = ("ddp", "zero3", "fsdp2")
# transformers' ways to compute experts beside the one that it takes by itself.
EXPERTS = [(family, way) for family in ("mixtral", "qwen3 moe") for way in ("eager", "batched_mm")]
# Each family once, each engine with each method once: the rest is `make parity`.
SHARE = {
    ("llama", "lora", "fsdp2"),
    ("qwen2", "lora", "ddp"),
    ("mixtral", "full", "zero3"),
    ("qwen3 moe", "lora", "zero3"),
    ("gemma", "full", "ddp"),
    ("gemma3", "lora", "fsdp2"),
    ("phi3", "full", "fsdp2"),
}
CELLS = [
    pytest.param(*cell, id=", ".join(cell), marks=() if cell in SHARE else pytest.mark.matrix)
    for cell in ((family, method, engine) for family in FAMILIES for method in METHODS for engine in ENGINES)
]


@pytest.mark.parametrize(("family", "experts"), [*((family, None) for family in FAMILIES), *EXPERTS])
def test_loss_and_gradient_are_the_plain_models(family: str, experts: str | None) -> None:
    fields = dict(FAMILIES[family])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=97, eos_token_id=1, bos_token_id=1)
    ours, theirs = model_pair(config)
    if "experts" in str(ours):
        ours.set_experts_implementation(experts or ours.config._experts_implementation)
        theirs.set_experts_implementation("eager")
    install_loss_head(ours)
    loss = micro_batch_loss(ours, packed(), torch.device("cpu"))
    loss.backward()
    expected = torch.zeros(())
    for document in documents():
        if len(document) > 1:
            logits = theirs(document[None], use_cache=False).logits[0, :-1]
            expected = expected + F.cross_entropy(logits, document[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for (name, mine), plain in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None, f"{name}: every rank must have a gradient for every weight"
        assert mine.grad.any() or "k_proj.bias" in name, name
        torch.testing.assert_close(mine.grad, plain.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "method", "engine"), CELLS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name
def test_a_family_trains_is_saved_and_read_back(family: str, method: str, engine: str, families: Families) -> None:
    golden, after = families.golden(family, method)
    assert abs(after / families.untrained(family) - 1) > 1e-3, "where nothing changes, equal curves say little"
    name = f"{family}-{method}-{engine}".replace(" ", "-")
    words = [f"parallel.engine={engine}", "parallel.processes=2", "batch.micro=2"]
    run = trained(families.recipe(family, method), name, *words)
    assert curve(run) == pytest.approx(golden.losses[:NUM_STEPS], rel=1e-5, abs=0)
    # Experts that see few tokens have small gradients, and Adam gives these full steps: ten times the rounding.
    assert curve(run, "train/grad_norm") == pytest.approx(golden.norms[:NUM_STEPS], rel=1e-4, abs=0)
    assert families.reread(family, method, run) == pytest.approx(after, rel=1e-5, abs=0)


class Families:
    """Tiny bases on disk, in the form in which their families are published, and their golden curves."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.folder = laboratory.folder
        steps = laboratory.steps("fresh", "mixed")
        self.steps, self.before = steps[: NUM_STEPS + 1], steps[NUM_STEPS + 1 :]
        self.base = cache(self._base)
        self.golden = cache(self._golden)

    def recipe(self, family: str, method: str) -> Path:
        path = self.folder / f"family-{family.replace(' ', '-')}-{method}.yaml"
        sections = {
            **COMMON,
            "name": path.stem,
            "steps": NUM_STEPS,
            "model": {"path": str(self.base(family)), "tokenizer": "builtin:tokenizer"},
            "method": {"kind": "lora", **LORA} if method == "lora" else "full",
            "data": {
                "sources": [{"path": "builtin:core.messages.jsonl", "rows": 1000}],
                "packing": "mixed",
                "split": EVERY_ROW,
            },
            "batch": {"length": LENGTH, "packs": PACKS},
            "optimizer": {"learning_rate": METHODS[method]},
        }
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
        return path

    def untrained(self, family: str) -> float:
        """Loss of the rows after the last step, before any."""
        model = _loaded(self.base(family))
        with torch.no_grad():
            return mean_loss(model.eval(), self.steps[NUM_STEPS]).item()

    def reread(self, family: str, method: str, run: Path) -> float:
        """The same loss of what the run wrote, as transformers and peft read it."""
        if method == "full":
            model = _loaded(run / "model")
        else:
            model = PeftModel.from_pretrained(_loaded(self.base(family)), run / "adapter")
        with torch.no_grad():
            return mean_loss(model.eval(), self.steps[NUM_STEPS]).item()

    @staticmethod
    def key(family: str, method: str) -> str:
        """The name of a curve in curves.json."""
        return f"family {family}, {method}"

    def fingerprint(self, family: str) -> str:
        return fingerprint(self.base(family) / "model.safetensors")

    def _golden(self, family: str, method: str) -> tuple[Curve, float]:
        """The curve by hand, and the loss of the next step's rows after it."""
        chosen = Method({}, METHODS[method], _adapted if method == "lora" else lambda model: model)
        found = committed_curve(
            self.key(family, method),
            self.fingerprint(family),
            lambda: trajectory(chosen, Start(lambda _: _loaded(self.base(family)), self.steps)),
        )
        return found, found.losses[NUM_STEPS]

    def _base(self, family: str) -> Path:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(materialise("tokenizer", self.folder / "builtin"))
        fields = dict(FAMILIES[family])
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=len(tokenizer), **ids)
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config)
        # A fresh model's layers hardly change what passes through them: a wrong one would not be seen.
        optimizer = adamw(model, 1e-2)
        for step in self.before:
            mean_loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = self.folder / f"base-{family.replace(' ', '-')}"
        model.save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def families(laboratory: Laboratory) -> Families:
    return Families(laboratory)


def _loaded(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
    )
    return model


def _adapted(model: nn.Module) -> nn.Module:
    # Where an adapter starts is not what is compared here.
    return attach(model, LoraMethod(**LORA), AdapterStart(seed=SEED))
