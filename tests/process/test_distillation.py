"""Distillation end to end: teacher pass, resident teacher, engines, and whether it teaches."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cli import curve
from packhorse.data.packs.loader import lay_out
from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.plan.run_plan import read_plan
from packhorse.train.objectives.forward import model_inputs
from packhorse.train.teacher import load_teacher
from ranks import planned, run_ranks, to_the_end, trained
from tiny import TINY, write_tiny

STUDENT = {**TINY["model"], "config": {**TINY["model"]["config"], "hidden_size": 24, "num_hidden_layers": 1}}


def write(folder: Path, **sections: Any) -> Path:
    """A recipe on few and short rows, of which 64 tokens make more than the 16 packs of a block."""
    rows = [
        [{"role": "user", "content": f"Add {n} and 1."}, {"role": "assistant", "content": f"It is {n + 1}."}]
        for n in range(120)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps({'messages': messages})}\n" for messages in rows), encoding="utf-8")
    return write_tiny(
        folder,
        data={"sources": [{"path": str(path)}]},
        batch={"length": 64, "packs": 8},
        steps=4,
        track={"wandb": "off", "every_steps": 1},
        **sections,
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(write(tmp_path_factory.mktemp("teacher")), "teacher")


def recipe(folder: Path, teacher: Path, **objective: Any) -> Path:
    section = {"kind": "distil", "teacher": {"path": str(teacher)}, **objective}
    return write(folder, model=STUDENT, objective=section)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, Path]:
    """A run on one process for each place of the teacher."""
    folder = tmp_path_factory.mktemp("single")
    return {
        "stored": trained(recipe(folder, teacher, top=8, sft_weight=0.5), "stored"),
        "resident": trained(recipe(folder, teacher, top="all", divergence="jsd", temperature=2.0), "resident"),
    }


def tokens_of(run: Path) -> list[tuple[NDArray[np.uint16], NDArray[np.float16]]]:
    """Ids and log-probabilities of each stored block."""
    (folder,) = run.parent.glob(".data/*/teacher/train-*")
    found = []
    for file in sorted(folder.glob("*.bin")):
        values = np.fromfile(file, np.uint16).reshape(2, -1, 8)
        found.append((values[0], values[1].view(np.float16)))
    assert len(found) > 1, "a killed pass must have blocks to keep"
    return found


@pytest.mark.parametrize(("place", "engine"), [("stored", "fsdp2"), ("resident", "fsdp2"), ("resident", "ddp")])
def test_two_ranks_learn_as_one_does(
    place: str, engine: str, single: dict[str, Path], tmp_path: Path, teacher: Path
) -> None:
    """In a folder of its own, so that two ranks store the teacher's tokens too."""
    words = ("parallel.processes=2", f"parallel.engine={engine}")
    objective = read_plan(single[place]).recipe.objective.model_dump(exclude={"kind", "teacher"})
    run = trained(recipe(tmp_path, teacher, **objective), place, *words)
    assert curve(run) == pytest.approx(curve(single[place]), rel=1e-5)
    for figure in ("train/grad_norm", "distil/divergence", "distil/teacher_entropy", "distil/kept_mass"):
        assert curve(run, figure) == pytest.approx(curve(single[place], figure), rel=1e-4), figure
    if place == "stored":
        for (ids, logps), (ids_of_one, logps_of_one) in zip(tokens_of(run), tokens_of(single[place]), strict=True):
            assert (ids == ids_of_one).mean() > 0.999  # equal log-probabilities may change places
            assert logps.astype(float) == pytest.approx(logps_of_one.astype(float), rel=2e-3)


def test_a_pass_that_is_killed_continues_with_the_same_bits(
    single: dict[str, Path], tmp_path: Path, teacher: Path
) -> None:
    run = planned(recipe(tmp_path, teacher, top=8, sft_weight=0.5), "stored")
    assert run_ranks(run, before=die_after_a_block) == []
    (folder,) = run.parent.glob(".data/*/teacher/train-*")
    assert len([*folder.glob("*.json")]) == 2, "the facts and one block"
    kept = next(folder.glob("*.bin")).stat().st_mtime_ns
    to_the_end(run, attempt=2)
    assert next(iter(sorted(folder.glob("*.bin")))).stat().st_mtime_ns == kept
    for ours, theirs in zip(tokens_of(run), tokens_of(single["stored"]), strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert curve(run) == curve(single["stored"])


def die_after_a_block(run: Path, rank: int) -> None:
    from packhorse.data.packs.top_tokens import TopTokens

    write = TopTokens.write

    def write_and_die(self: TopTokens, *words: Any) -> None:
        write(self, *words)
        os.kill(os.getpid(), signal.SIGKILL)

    TopTokens.write = write_and_die  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name
def test_the_adapter_of_an_earlier_run_is_merged_into_its_base(teacher: Path, tmp_path: Path) -> None:
    """Loaded in this process; probabilities are those of peft's own model."""
    run = planned(write(tmp_path, model={"path": str(teacher)}, method="lora"), "adapted")
    base = AutoModelForCausalLM.from_pretrained(teacher / "model")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(run / "adapter")
    plan = read_plan(planned(recipe(tmp_path, run), "student"))
    assert plan.data is not None
    tokenizer = tokenizer_of(plan.recipe, Path(plan.data.tokenizer))
    loaded = load_teacher(plan, tokenizer, torch.device("cpu"), lambda: None)
    ids = torch.arange(20, 40)[None]
    inputs = model_inputs(lay_out([ids[0].numpy()], [np.ones(20, np.uint8)]), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs, use_cache=False).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
