"""A folder in which all runs of the matrix share their rows and base models, and golden curves are had once."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from committed import committed_curve, fingerprint
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast

import shared_folder
from golden import METHODS, SEED, Curve, Document, Start, adamw, mean_loss, pretrained, trajectory
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.quickstart.files import materialise
from packhorse.recipe.load import load_recipe
from tiny import TINY

STEPS = 20
"""Steps of a golden curve."""
RUN_STEPS = int(os.environ.get("PARITY_STEPS", "10"))
"""Steps of a run that is held against it; `make parity` takes all."""
PACKS = 8
QA_TEMPLATE = Path(__file__).parents[1] / "real" / "qa.jinja"
PRETRAINING_STEPS = 40

COMMON: dict[str, Any] = {
    "seed": SEED,
    "steps": RUN_STEPS,
    "schedule": {"name": "constant", "warmup_ratio": 0.0},
    "precision": "fp32",
    "evaluation": {"max_answered_rows": 0},
    "track": {"wandb": "off"},
}
EVERY_ROW = {"train": 1.0, "validation": 0.0, "test": 0.0}


class Laboratory:
    """Recipes, prepared rows and golden curves below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.golden = cache(self._golden)
        self.steps = cache(self._steps)
        self.fingerprint = cache(self._fingerprint)

    def recipe(self, method: str, base: str, packing: str) -> Path:
        """Writes the recipe: what is learnt, not how it is shared out."""
        self._make_base(base)
        chosen = METHODS[method]
        path = self.folder / f"{method}-{base}-{packing}.yaml"
        sections = {
            **COMMON,
            "name": path.stem,
            "model": _MODELS[base](self.folder),
            "method": chosen.section,
            "data": {**_DATA[base](), "packing": packing, "split": EVERY_ROW},
            "batch": {"length": _LENGTHS[base], "packs": PACKS},
            "optimizer": {"learning_rate": chosen.learning_rate},
        }
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
        return path

    def start(self, base: str, packing: str) -> Start:
        """The base model and the documents of each step, for the loop by hand."""
        self._make_base(base)
        load = self._fresh if base == "fresh" else pretrained(_base_folder(base, self.folder))
        return Start(load, self.steps(base, packing))

    @staticmethod
    def key(method: str, base: str, packing: str) -> str:
        """The name of a curve in curves.json."""
        return f"{method}, {base}, {packing}"

    def _golden(self, method: str, base: str, packing: str) -> Curve:
        return committed_curve(
            self.key(method, base, packing),
            self.fingerprint(base),
            lambda: trajectory(METHODS[method], self.start(base, packing)),
        )

    def _fingerprint(self, base: str) -> str:
        self._make_base(base)
        if base == "fresh":
            return fingerprint(self._fresh(None).state_dict())
        return fingerprint(_base_folder(base, self.folder) / "model.safetensors")

    def _steps(self, base: str, packing: str, num_steps: int = STEPS) -> list[list[Document]]:
        recipe = load_recipe(str(self.recipe("full", "fresh" if base == "tiny" else base, packing)), [])
        recipe = recipe.model_copy(update={"runs_folder": str(self.folder / "runs")})
        store = open_store(prepare(recipe).folder, "train")
        plan = BatchPlan(store.pack_costs, PACKS, SEED, store.in_order)
        packs = (plan.packs(step) for step in range(num_steps))
        return [[store.document(d) for pack in chosen for d in store.documents_of(int(pack))] for chosen in packs]

    def _fresh(self, _: BitsAndBytesConfig | None) -> nn.Module:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(materialise("tokenizer", self.folder / "builtin"))
        fields = {key: value for key, value in TINY["model"]["config"].items() if key != "model_type"}
        config = LlamaConfig(
            **fields,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def _make_base(self, base: str) -> None:
        """The fresh model, trained a little by hand: an adapter needs a model that knows something."""
        folder = _base_folder("tiny", self.folder)
        if base != "tiny" or folder.exists():
            return
        model = self._fresh(None)
        optimizer = adamw(model, 1e-2)
        for documents in self._steps("tiny", "mixed", PRETRAINING_STEPS):
            mean_loss(model, documents).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)


def _base_folder(base: str, folder: Path) -> Path:
    return folder / "base" if base == "tiny" else shared_folder.shared("models/stories260K-llama")


_LENGTHS = {"fresh": 128, "tiny": 128, "stories260K": 384}
_MODELS = {
    "fresh": lambda _: TINY["model"],
    "tiny": lambda folder: {"path": str(folder / "base"), "tokenizer": "builtin:tokenizer"},
    "stories260K": lambda folder: {"path": str(_base_folder("stories260K", folder))},
}


def _builtin() -> dict[str, Any]:
    return {"sources": [{"path": "builtin:core.messages.jsonl", "rows": 1000}]}


def _gsm8k() -> dict[str, Any]:
    rows = str(shared_folder.shared("data/gsm8k_train.jsonl"))
    return {"sources": [{"path": rows, "rows": 600}], "template": str(QA_TEMPLATE), "over_long": "drop"}


_DATA = {"fresh": _builtin, "tiny": _builtin, "stories260K": _gsm8k}
