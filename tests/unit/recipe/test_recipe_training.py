"""Rules between the fields on training."""

import pytest

from packhorse.recipe.load import load_recipe

LION = ["optimizer.name=lion", "optimizer.betas=[0.9, 0.99]"]
IN_BACKWARD = ["optimizer.in_backward=true", "optimizer.clip_norm=null"]
REFUSED = {
    "lion-rate": ([*LION, "optimizer.learning_rate=0.02"], "optimizer.learning_rate is 0.02, above 0.01."),
    "lion-betas": (
        ["optimizer.name=lion_8bit"],
        "optimizer.name is lion_8bit, and optimizer.betas is [0.9, 0.999], which is AdamW's.",
    ),
    "lion-epsilon": (
        [*LION, "optimizer.epsilon=1e-6"],
        "optimizer.epsilon is 1e-06, and optimizer.name is lion.",
    ),
    "adafactor-betas": (
        ["optimizer.name=adafactor", "optimizer.betas=[0.9, 0.95]"],
        "optimizer.betas is [0.9, 0.95], and optimizer.name is adafactor.",
    ),
    "momentum-of-adamw": (
        ["optimizer.momentum=0.9"],
        "optimizer.momentum is 0.9, and optimizer.name is adamw.",
    ),
    "lora-plus-too-fast": (
        ["method={kind: lora, learning_rate_ratio: 16}", "optimizer.learning_rate=0.01"],
        "method.learning_rate_ratio 16 x optimizer.learning_rate 0.01 is 0.16, above 0.1.",
    ),
    "muon-without-matrices": (
        ["optimizer.name=muon", "method=ia3"],
        "optimizer.name is muon, and method is ia3.",
    ),
    "in-backward-clipped": (
        ["optimizer.in_backward=true"],
        "optimizer.in_backward is true, and optimizer.clip_norm is 1.",
    ),
    "in-backward-fp16": (
        [*IN_BACKWARD, "precision=fp16"],
        "optimizer.in_backward is true, and precision is fp16.",
    ),
    "wsd-without-decay": (
        ["schedule={name: wsd, decay_ratio: 0}"],
        "schedule.name is wsd, and schedule.decay_ratio is 0.",
    ),
    "wsd-too-long": (
        ["schedule={name: wsd, warmup_ratio: 0.25, decay_ratio: 0.8}"],
        "the warm-up takes 0.25 of all steps and schedule.decay_ratio 0.8: 1.05 together.",
    ),
    "wsd-too-many-steps": (
        ["schedule={name: wsd, warmup_steps: 5, decay_ratio: 0.6}", "epochs=null", "steps=10"],
        "the warm-up takes 0.5 of all steps and schedule.decay_ratio 0.6: 1.1 together.",
    ),
    "skip-in-backward": (
        [*IN_BACKWARD, "recovery.on_nonfinite=skip"],
        "recovery.on_nonfinite is skip, and optimizer.in_backward is true.",
    ),
    "rewind-without-checkpoints": (
        ["recovery.on_spike=rewind", "checkpoint.every_steps=null"],
        "recovery.on_spike is rewind, and checkpoint.every_steps is not given.",
    ),
    "rewind-beyond-checkpoints": (
        ["recovery={on_spike: rewind, rewind_steps: 6}", "checkpoint={every_steps: 2, keep_last: 3}"],
        "recovery.rewind_steps is 6, and of the checkpoints every 2 steps the last 3 are kept.",
    ),
    "rewind-over-most": (
        ["recovery={on_spike: rewind, rewind_steps: 5, most_skipped: 4}", "checkpoint.every_steps=5"],
        "recovery.rewind_steps is 5, and recovery.most_skipped is 4.",
    ),
    "tf32-of-bf16": (["tf32=true"], "tf32 is true, and precision is bf16."),
    "bf16-weights-fp16-arithmetic": (
        ["precision=fp16", "model.dtype=bfloat16"],
        "precision is fp16, but model.dtype is bfloat16.",
    ),
    "noise-of-fp16": (
        ["precision=fp16", "track.noise_scale=true"],
        "precision is fp16, and track.noise_scale is true.",
    ),
    "offload-of-everything": (
        ["parallel.offload_activations=true"],
        "parallel.offload_activations is true, and parallel.checkpointing is false.",
    ),
}


@pytest.mark.parametrize(("overrides", "fact"), REFUSED.values(), ids=REFUSED)
def test_refused(good, mistakes_of, overrides, fact):
    (mistake,) = mistakes_of(good, *overrides)
    assert mistake.fact == fact


@pytest.mark.parametrize(
    "overrides",
    [
        LION,
        ["optimizer.name=adafactor", "optimizer.learning_rate=1e-2"],
        ["optimizer.name=muon", "optimizer.momentum=0.9", "optimizer.betas=[0.9, 0.95]"],
        IN_BACKWARD,
        ["schedule={name: wsd, warmup_ratio: 0.2, decay_ratio: 0.8}"],
        ["schedule={name: cosine, warmup_ratio: 0.5, decay_ratio: 0.8}"],
        ["tf32=true", "precision=fp32"],
        ["precision=fp16"],
        ["parallel={offload_activations: true, checkpointing: 2}"],
        ["optimizer.name=paged_adamw_8bit"],
        ["recovery={on_spike: rewind, rewind_steps: 6}", "checkpoint={every_steps: 2, keep_last: 4}"],
        ["method={kind: lora, learning_rate_ratio: 16}", "optimizer.learning_rate=1e-4"],
    ],
    ids=str,
)
def test_allowed(good, overrides):
    load_recipe(good, overrides)
