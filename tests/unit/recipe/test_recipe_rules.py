"""Rules between fields: each refuses its case, and lets the neighbouring good case through."""

import pytest

from packhorse.recipe.load import load_recipe

FRESH = "model={config: {model_type: llama}, tokenizer: builtin:tokenizer}"
REFUSED = {
    "no-model": (["model={}"], "model gives none of id, path and config."),
    "two-models": (["model.path=x"], "model gives id and path at once."),
    "revision-of-a-path": (
        ["model={path: x, revision: main}"],
        "model.revision is main, but there is no model.id.",
    ),
    "fresh-without-type": (
        [FRESH, "method=full", "model.config={a: 1}"],
        "model.config has no model_type.",
    ),
    "fresh-without-tokenizer": (
        [FRESH, "method=full", "model.tokenizer=null"],
        "model.config is given without model.tokenizer.",
    ),
    "fresh-lora": ([FRESH], "method is lora, but model.config starts from random weights."),
    "fresh-qlora": ([FRESH, "method=qlora"], "method is qlora, but model.config starts from random weights."),
    "no-targets": (["method={kind: lora, target: []}"], "method.target is an empty list."),
    "partial-of-nothing": (
        ["method=partial"],
        "method is partial, and none of last_layers, train and freeze is given.",
    ),
    "trained-twice": (
        ["method={kind: lora, target: [q_proj], train_also: [q_proj]}"],
        "method.target and method.train_also both name q_proj.",
    ),
    "odd-orthogonal": (
        ["method={kind: lora, rank: 7, initialization: orthogonal}"],
        "method.initialization is orthogonal, and method.rank is 7.",
    ),
    "loftq-of-nothing": (
        ["method={kind: lora, initialization: loftq}"],
        "method.initialization is loftq, and method is lora.",
    ),
    "dora-loftq": (
        ["method={kind: qlora, dora: true, initialization: loftq}"],
        "method.dora is true, and method.initialization is loftq.",
    ),
    "quantised-pissa": (
        ["method={kind: qlora, initialization: pissa}"],
        "method.initialization is pissa, and method is qlora.",
    ),
    "int8-loftq": (
        ["method={kind: qlora, quantization: int8, initialization: loftq}"],
        "method.initialization is loftq, and method.quantization is int8.",
    ),
    "int8-dora": (
        ["method={kind: qlora, quantization: int8, dora: true}"],
        "method.dora is true, and method.quantization is int8.",
    ),
    "experts-dropout": (["method={kind: lora, experts: true}"], "method.experts is true, and method.dropout is 0.05."),
    "experts-pissa": (
        ["method={kind: lora, experts: true, dropout: 0, initialization: pissa}"],
        "method.experts is true, and method.initialization is pissa.",
    ),
    "ia3-of-nothing": (["method={kind: ia3, target: []}"], "method.target is an empty list."),
    "ia3-auto": (
        ["method={kind: ia3, feedforward: [down_proj]}"],
        "method.feedforward names down_proj, and method.target is auto.",
    ),
    "ia3-feedforward": (
        ["method={kind: ia3, target: [k_proj], feedforward: [down_proj]}"],
        "method.feedforward has down_proj, which method.target lacks.",
    ),
    "prompt-of-no-text": (["method={kind: prompt_tuning, text: ' '}"], "method.text is empty."),
    "empty-token": (["model.new_tokens=['']"], "model.new_tokens has an empty token."),
    "token-twice": (["model.new_tokens=[a, b, a]"], "model.new_tokens has a twice."),
    "new-tokens-of-a-prompt": (
        ["model.new_tokens=[a]", "method=prefix_tuning"],
        "model.new_tokens adds 1 tokens, and method is prefix_tuning.",
    ),
    "bf16-weights-fp32-arithmetic": (
        ["precision=fp32", "model.dtype=bfloat16"],
        "precision is fp32, but model.dtype is bfloat16.",
    ),
    "source-of-nowhere": (["data.sources=[{format: text}]"], "data.sources.0 gives neither path nor id."),
    "source-of-two-places": (["data.sources.0.id=x"], "data.sources.0 gives path and id at once."),
    "validation-source": (["data.validation=[{}]"], "data.validation.0 gives neither path nor id."),
    "test-source": (["data.test=[{}]"], "data.test.0 gives neither path nor id."),
    "retain-source": (["data.retain=[{path: a},{}]"], "data.retain.1 gives neither path nor id."),
    "split-of-a-file": (
        ["data.sources.0.split=test"],
        "data.sources.0.split is test, but data.sources.0 is a local file.",
    ),
    "key-of-the-hub": (
        ["data.sources=[{id: owner/set, key: train}]"],
        "data.sources.0.key is train, but data.sources.0 is a data set on the hub.",
    ),
    "subset-of-a-file": (
        ["data.sources.0.subset=en"],
        "data.sources.0.subset is en, but data.sources.0 is a local file.",
    ),
    "shares": (
        ["data.split={train: 0.6, validation: 0.15, test: 0.15}"],
        "the shares of data.split are 0.6 + 0.15 + 0.15 = 0.9.",
    ),
    "one-share-of-three": (["data.split.train=0.6"], "the shares of data.split are 0.6 = 0.6."),
    "shares-above-one": (["data.split={train: 0.9, test: 0.3}"], "the shares of data.split are 0.9 + 0.3 = 1.2."),
    "no-rest-to-train-on": (["data.split={validation: 0.5, test: 0.5}"], "data.split.train is 0."),
    "half-weighted": (
        ["data.sources=[{path: a, weight: 1}, {path: b}]"],
        "1 of 2 sources have a weight; data.sources.1 has none.",
    ),
    "weight-and-rows": (
        ["data.sources=[{path: a, weight: 1, rows: 3}]"],
        "data.sources.0 gives rows (3) and weight (1) at once.",
    ),
    "weight-of-validation": (
        ["data.validation=[{path: a, weight: 2}]"],
        "data.validation.0.weight is 2.",
    ),
    "weight-of-test": (["data.test=[{path: a, weight: 2}]"], "data.test.0.weight is 2."),
    "all-rows-to-test": (["data.validation=[{path: a}]", "data.split={test: 1}"], "data.split.train is 0."),
    "no-whole-beside-test": (
        ["data.test=[{path: a}]", "data.split={train: 0.7, validation: 0.1}"],
        "the shares of data.split are 0.7 + 0.1 + 0 = 0.8.",
    ),
    "role": (["data.sources=[{path: a, roles: {agent: bot}}]"], "data.sources.0.roles.agent is bot."),
    "decontaminate-source": (
        ["data.decontaminate={against: [{}]}"],
        "data.decontaminate.against.0 gives neither path nor id.",
    ),
    "no-training-share": (
        ["data.split={train: 0, validation: 0.5, test: 0.5}"],
        "data.split.train is 0.",
    ),
    "micro": (["batch={packs: 64, micro: 9}"], "batch.micro is 9, which does not divide batch.packs 64."),
    "micro-above": (["batch={packs: 4, micro: 9}"], "batch.micro is 9, which does not divide batch.packs 4."),
    "learning-rate": (["optimizer.learning_rate=1e4"], "optimizer.learning_rate is 10000, above 0.1."),
    "beta": (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1 is 1."),
    "endless": (["epochs=null"], "neither steps nor epochs is given."),
    "two-lengths": (["steps=3", "epochs=1"], "steps is 3 and epochs is 1."),
    "warm-up-only": (["steps=10", "schedule.warmup_steps=10"], "schedule.warmup_steps is 10, of 10 steps."),
    "warm-up-ratio": (["schedule.warmup_ratio=1"], "schedule.warmup_ratio is 1."),
}


@pytest.mark.parametrize(("overrides", "fact"), REFUSED.values(), ids=REFUSED)
def test_refused(good, mistakes_of, overrides, fact):
    (mistake,) = mistakes_of(good, *overrides)
    assert mistake.fact == fact


@pytest.mark.parametrize(
    "overrides",
    [
        [FRESH, "method=full"],
        ["model.revision=main"],
        ["precision=fp32"],
        ["model.dtype=float32"],
        ["data.split={train: 0.1, validation: 0.2, test: 0.7}"],
        ["data.split={train: 0.8, validation: 0.2}"],
        ["data.split={train: 0.8, validation: 0.1}"],
        ["data.split={validation: 0.1, test: 0.1}"],
        ["data.sources=[{path: a, weight: 1}, {path: b, weight: 0.5}]"],
        ["data.sources=[{path: a, rows: 10, roles: {agent: assistant}}]"],
        ["data.split={train: 1, validation: 0, test: 0}"],
        ["data.validation=[{path: v}]", "data.split.train=0"],
        ["data.validation=[{path: v}]", "data.split={test: 0.1}"],
        ["data.test=[{path: t}]", "data.split={validation: 0.1}"],
        ["data.sources=[{id: a, subset: b, revision: c}]"],
        ["batch={packs: 64, micro: 64}"],
        ["optimizer.learning_rate=0.1"],
        ["steps=10", "schedule.warmup_steps=9"],
        ["method=qlora"],
    ],
    ids=str,
)
def test_allowed(good, overrides):
    load_recipe(good, overrides)


@pytest.mark.parametrize(("micro", "names"), [(9, "8 or 16"), (40, "32 or 64"), (65, "64")])
def test_the_nearest_divisors_are_named(good, mistakes_of, micro, names):
    (mistake,) = mistakes_of(good, f"batch={{packs: 64, micro: {micro}}}")
    assert mistake.fix == f"set batch.micro to {names}."
