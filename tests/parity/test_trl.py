"""A peer that others wrote: TRL's SFTTrainer on the same rows has the same first loss and the same first gradient."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from laboratory import Laboratory
from launches import ENGINES, train_forked
from transformers import PreTrainedTokenizerFast

from cli import curve
from golden import CLIP_NORM, METHODS, SEED, Document
from packhorse.quickstart.files import materialise

TOLERANCE = 1e-5


def _rows(documents: list[Document]) -> Dataset:
    masked = [
        {"input_ids": ids.tolist(), "labels": [t if on else -100 for t, on in zip(ids.tolist(), mask.tolist())]}
        for ids, mask in documents
    ]
    return Dataset.from_list(masked)


def first_step_of_trl(laboratory: Laboratory, method: str, folder: Path) -> tuple[float, float]:
    """Loss and gradient norm of one step over a padded batch with an attention mask."""
    # Only here: it takes ten seconds, and other tests of this folder run without it.
    from trl import SFTConfig, SFTTrainer

    start = laboratory.start("tiny", "none")
    rows = _rows(start.steps[0])
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        learning_rate=METHODS[method].learning_rate,
        max_grad_norm=CLIP_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        packing=False,
        max_length=None,
        seed=SEED,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(materialise("tokenizer", laboratory.folder / "builtin"))
    model = METHODS[method].attach(start.model(None))
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    done = trainer.train()
    return done.training_loss, trainer.state.log_history[0]["grad_norm"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_step_is_trls(method: str, laboratory: Laboratory, tmp_path: Path) -> None:
    recipe = laboratory.recipe(method, "tiny", "none")
    run = train_forked(recipe, ENGINES["ddp x 2"], f"{method}-beside-trl", "steps=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and peft's about their own future
        loss, norm = first_step_of_trl(laboratory, method, tmp_path)
    assert curve(run) == pytest.approx([loss], rel=TOLERANCE)
    assert curve(run, "train/grad_norm") == pytest.approx([norm], rel=TOLERANCE)
