"""`packhorse recipes import`: files in the public form of other trainers become recipes that load and mean the same."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from packhorse.cli.main import main
from packhorse.data.resolve import NAMED_TEMPLATES
from packhorse.errors import UserError
from packhorse.recipe.importers.draft import trainers
from packhorse.recipe.importers.importer import import_recipe
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Format, recipe_view

AXOLOTL_QLORA = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - {path: org/alpaca, type: alpaca, split: "train[:10%]"}
val_set_size: 0
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-4
bf16: auto
tf32: true
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json
"""
AXOLOTL_CHAT = """
base_model: ./models/llama
load_in_8bit: true
chat_template: llama3
datasets:
  - path: org/chats
    type: chat_template
    field_messages: dialog
    message_property_mappings: {role: speaker, content: says}
    roles: {user: [customer], assistant: [agent]}
    roles_to_train: [assistant, user]
  - {path: json, data_files: [a.jsonl, b.jsonl], ds_type: json, type: completion, field: body}
  - path: rows.jsonl
    type: {field_instruction: ask, field_output: reply, format: "Q: {instruction} A:"}
test_datasets:
  - {path: held.jsonl, type: chat_template}
adapter: lora
sequence_len: 2048
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
micro_batch_size: 3
num_epochs: 2.5
optimizer: adamw_bnb_8bit
lr_scheduler: rex
learning_rate: 2e-4
train_on_inputs: false
eval_steps: 0.1
max_grad_norm: 0
hub_token: hf_abcdefghijklmnopqrstuvwxyzABCDEFGH
fsdp: [full_shard, auto_wrap]
fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}
"""
LLAMA_FACTORY_FULL = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: identity,chat
dataset_dir: sets
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/llama3-8b/full/sft
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
LLAMA_FACTORY_QLORA = """
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
quantization_bit: 4
quantization_method: bnb
double_quantization: false
stage: sft
lora_rank: 8
lora_target: all
dataset: identity
template: qwen
packing: true
adam_beta2: 0.95
fp16: true
max_steps: 300
save_strategy: "no"
save_steps: 100
report_to: [tensorboard]
"""
TRL_SHORT = """
model_name_or_path:
  Qwen/Qwen2.5-0.5B
dataset_name:
  org/reviews
dataset_train_split: train_sft
dataset_text_field: review
report_to:
  none
"""
TRL_LORA = """
model_name_or_path: mistralai/Mistral-7B-v0.1
model_revision: main
dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
lora_r: 64
lora_target_modules: all-linear
load_in_4bit: true
chat_template: "{% for m in messages %}{{ m['content'] }}{% endfor %}"
dataset_mixture:
  datasets:
    - {id: org/chats, config: v1, split: train, columns: [messages], weight: 0.5}
  test_split_size: 1000
assistant_only_loss: true
packing: true
packing_strategy: wrapped
max_length: 4096
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_steps: 0
max_steps: -1
num_train_epochs: 1
run_name: my chat run
per_device_train_batch_size: 4
eval_strategy: epoch
save_steps: 100
save_total_limit: 1
seed: 7
push_to_hub: true
"""
TORCHTUNE_LORA = """
output_dir: /tmp/torchtune/lora_single_device
model_dir: /tmp/Meta-Llama-3-8B-Instruct
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: ${model_dir}/original/tokenizer.model
  max_seq_len: 1024
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${model_dir}
  checkpoint_files: [model-00001-of-00004.safetensors]
  model_type: LLAMA3
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
seed: null
shuffle: False
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
epochs: 2
max_steps_per_epoch: 500
gradient_accumulation_steps: 8
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger}
dtype: bf16
enable_activation_checkpointing: True
"""
TORCHTUNE_FULL = """
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer}
model: {_component_: torchtune.models.llama3.llama3_8b}
checkpointer:
  _component_: torchtune.training.FullModelMetaCheckpointer
  checkpoint_dir: /tmp/Meta-Llama-3-8B/original/
dataset:
  - {_component_: torchtune.datasets.chat_dataset, source: org/talks, conversation_column: dialog,
     conversation_style: sharegpt}
  - {_component_: torchtune.datasets.text_completion_dataset, source: json, data_files: a.jsonl, column: body}
batch_size: 1
epochs: 3
optimizer: {_component_: bitsandbytes.optim.PagedAdamW8bit, lr: 2e-5}
clip_grad_norm: 1.0
"""
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "axolotl-qlora": (
        AXOLOTL_QLORA,
        {
            "name": "qlora-out",
            "runs_folder": "outputs",
            "model.id": "NousResearch/Meta-Llama-3-8B",
            "method.kind": "qlora",
            "method.quantization": "nf4",
            "method.rank": 32,
            "method.alpha": 16.0,
            "method.dropout": 0.0,
            "method.target": "all-linear",
            "data.sources.0.id": "org/alpaca",
            "data.sources.0.format": "alpaca",
            "data.sources.0.split": "train[:10%]",
            "data.split.train": 1.0,
            "data.template": "alpaca",
            "data.over_long": "drop",
            "data.packing": "mixed",
            "batch.length": 4096,
            "batch.packs": 8,
            "optimizer.learning_rate": 2e-4,
            "optimizer.name": "paged_adamw",
            "optimizer.weight_decay": 0.0,
            "schedule.name": "cosine",
            "schedule.warmup_steps": 10,
            "schedule.final_ratio": 0.1,
            "epochs": 4,
            "precision": "bf16",
            "tf32": False,
            "parallel.engine": "zero3_offload",
            "parallel.checkpointing": True,
            "track.every_steps": 1,
        },
    ),
    "axolotl-chat": (
        AXOLOTL_CHAT,
        {
            "model.path": "./models/llama",
            "method.kind": "qlora",
            "method.quantization": "int8",
            "method.target": ["q_proj", "v_proj"],
            "data.sources.0.columns": {"messages": "dialog", "role": "speaker", "content": "says"},
            "data.sources.0.roles": {"customer": "user", "agent": "assistant"},
            "data.sources.1.path": "a.jsonl",
            "data.sources.2.path": "b.jsonl",
            "data.sources.2.columns": {"text": "body"},
            "data.sources.2.format": "text",
            "data.sources.3.columns": {"instruction": "ask", "output": "reply"},
            "data.validation.0.path": "held.jsonl",
            "data.train_on.roles": ["assistant", "user"],
            "data.template": "llama3",
            "data.packing": "none",
            "optimizer.name": "adamw_8bit",
            "optimizer.clip_norm": None,
            "evaluation.every_steps": None,
            "epochs": 3,
            "parallel.engine": "hsdp",
        },
    ),
    "llama-factory-full": (
        LLAMA_FACTORY_FULL,
        {
            "name": "sft",
            "runs_folder": "saves/llama3-8b/full",
            "model.id": "meta-llama/Meta-Llama-3-8B-Instruct",
            "model.trust_remote_code": False,
            "method.kind": "full",
            "data.sources.0.path": "sets/identity.json",
            "data.sources.0.format": "alpaca",
            "data.sources.0.rows": 1000,
            "data.sources.1.id": "me/chat",
            "data.sources.1.subset": "v2",
            "data.sources.1.format": "sharegpt",
            "data.sources.1.columns": {"conversations": "dialog", "from": "role", "value": "content"},
            "data.sources.1.roles": {"obs": "tool"},
            "data.template": "llama3",
            "data.split.train": 0.9,
            "data.split.validation": 0.1,
            "data.over_long": "truncate",
            "batch.packs": 2,
            "schedule.warmup_ratio": 0.1,
            "epochs": 3,
            "parallel.engine": "zero3",
            "evaluation.every_steps": 500,
            "checkpoint.every_steps": 500,
            "track.every_steps": 10,
        },
    ),
    "llama-factory-qlora": (
        LLAMA_FACTORY_QLORA,
        {
            "method.kind": "qlora",
            "method.rank": 8,
            "method.alpha": 16.0,
            "method.double_quantization": False,
            "method.target": "all-linear",
            "data.sources.0.path": "data/identity.json",
            "data.template": "chatml",
            "data.packing": "mixed",
            "optimizer.learning_rate": 5e-5,
            "optimizer.betas": (0.9, 0.95),
            "schedule.name": "linear",
            "precision": "fp16",
            "steps": 300,
            "epochs": None,
            "checkpoint.every_steps": None,
            "track.wandb": "off",
            "track.tensorboard": True,
        },
    ),
    "trl-short": (
        TRL_SHORT,
        {
            "name": "file",
            "method.kind": "full",
            "data.sources.0.id": "org/reviews",
            "data.sources.0.split": "train_sft",
            "data.sources.0.columns": {"text": "review"},
            "data.packing": "none",
            "track.wandb": "off",
        },
    ),
    "trl-lora": (
        TRL_LORA,
        {
            "name": "my-chat-run",
            "seed": 7,
            "model.revision": "main",
            "model.dtype": "bfloat16",
            "method.kind": "qlora",
            "method.rank": 64,
            "method.double_quantization": False,
            "method.target": "all-linear",
            "data.sources.0.id": "org/chats",
            "data.sources.0.subset": "v1",
            "data.sources.0.format": "messages",
            "data.sources.0.weight": None,
            "data.template": "tokenizer",
            "data.packing": "mixed",
            "batch.packs": 4,
            "schedule.name": "cosine",
            "schedule.final_ratio": 0.1,
            "schedule.warmup_ratio": 0.0,
            "epochs": 1,
            "checkpoint.every_steps": 100,
            "checkpoint.keep_last": 1,
        },
    ),
    "torchtune-lora": (
        TORCHTUNE_LORA,
        {
            "name": "lora_single_device",
            "runs_folder": "/tmp/torchtune",
            "model.path": "/tmp/Meta-Llama-3-8B-Instruct",
            "method.kind": "lora",
            "method.rank": 8,
            "method.dropout": 0.0,
            "method.target": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "data.sources.0.id": "yahma/alpaca-cleaned",
            "data.sources.0.format": "alpaca",
            "data.train_on.roles": ["assistant", "user"],
            "data.packing": "mixed",
            "batch.length": 1024,
            "batch.packs": 16,
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 3e-4,
            "optimizer.weight_decay": 0.01,
            "optimizer.clip_norm": None,
            "schedule.name": "cosine",
            "schedule.warmup_steps": 100,
            "steps": 1000,
            "epochs": None,
            "precision": "bf16",
            "parallel.checkpointing": True,
            "track.wandb": "off",
        },
    ),
    "torchtune-full": (
        TORCHTUNE_FULL,
        {
            "model.path": "/tmp/Meta-Llama-3-8B",
            "method.kind": "full",
            "data.sources.0.id": "org/talks",
            "data.sources.0.format": "sharegpt",
            "data.sources.0.columns": {"conversations": "dialog"},
            "data.sources.1.path": "a.jsonl",
            "data.sources.1.columns": {"text": "body"},
            "batch.packs": 1,
            "optimizer.name": "paged_adamw_8bit",
            "optimizer.clip_norm": 1.0,
            "schedule.name": "constant",
        },
    ),
}
# Keys whose value asks for what a recipe does anyway, or that only say where another key is looked up.
NOTHING_TO_WRITE = {
    "load_in_8bit": (False,),
    "flash_attention": (True,),
    "bf16": (True, "auto"),
    "fsdp": (["full_shard", "auto_wrap"],),  # fsdp_config is in the same file
    "train_on_inputs": (False,),
    "max_steps": (-1,),
    "val_set_size": (0,),
    "warmup_steps": (0,),
    "stage": ("sft",),
    "eval_strategy": ("steps",),
    "sample_packing": (False,),
    "lora_target": ("all",),
    "attn_implementation": ("flash_attention_2",),
    "dtype": ("bf16",),
    "gradient_accumulation_steps": (1,),
    "batch_size": (1,),
    "model": ({"_component_": "torchtune.models.llama3.llama3_8b"},),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with the description of data sets that LLaMA-Factory reads."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "observation_tag": "obs"}
    info = {
        "identity": {"file_name": "identity.json"},
        "chat": {
            "hf_hub_url": "me/chat",
            "formatting": "sharegpt",
            "columns": {"messages": "dialog"},
            "tags": tags,
            "subset": "v2",
        },
    }
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(text: str, trainer: str = "", num_gpus: int = 1) -> str:
    Path("file.yaml").write_text(text)
    return import_recipe(Path("file.yaml"), trainer, num_gpus).text


def value_at(values: Any, path: str) -> Any:
    for step in path.split("."):
        values = values[int(step)] if step.isdigit() else values[step]
    return values


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_a_file_becomes_a_recipe_that_means_the_same(text: str, expected: dict[str, Any]) -> None:
    Path("file.yaml").write_text(text)
    assert main(["recipes", "import", "file.yaml", "--out", "my.yaml"]) == 0
    values = load_recipe("my.yaml").model_dump()
    assert {path: value_at(values, path) for path in expected} == expected


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_no_key_disappears(text: str, expected: dict[str, Any]) -> None:
    """Without the key, the recipe or its comments differ."""
    values, whole, silent = yaml.safe_load(text), imported(text), []
    trainer = next(name for name in trainers() if trainers()[name]["title"] in whole)
    for key, value in values.items():
        if value is None or value in NOTHING_TO_WRITE.get(key, ()):
            continue
        try:
            without = imported(yaml.safe_dump({name: v for name, v in values.items() if name != key}), trainer)
        except UserError:  # the key is needed
            continue
        silent += [key] if without == imported(yaml.safe_dump(values), trainer) else []
    assert silent == []


@pytest.mark.parametrize("value", [{"a": [1]}, "w: # ''x"], ids=["section", "text"])
@pytest.mark.parametrize("name", ["axolotl-chat", "llama-factory-qlora", "torchtune-lora"])
def test_a_value_of_another_type_is_a_mistake_of_the_file_or_a_comment(name: str, value: object) -> None:
    values = yaml.safe_load(FILES[name][0])
    trainer = name.rpartition("-")[0].replace("-", "")
    for key in values:
        with suppress(UserError):  # anything else would be a traceback
            imported(yaml.safe_dump({**values, key: value}), trainer)


@pytest.mark.parametrize(
    ("text", "comment"),
    [
        (AXOLOTL_QLORA, "# evals_per_epoch: 4 -> evaluation.every_steps counts steps"),
        (AXOLOTL_QLORA, "# tf32: true -> it applies to products of fp32 matrices"),
        (AXOLOTL_QLORA, "# 2 per GPU x 4 gradient accumulation x 1 GPU = 8 packs in one step."),
        (AXOLOTL_CHAT, "# lr_scheduler: rex -> schedule.name takes one of cosine, linear, constant, wsd"),
        (AXOLOTL_CHAT, "# eval_steps: 0.1 -> evaluation.every_steps is a whole number of steps"),
        (AXOLOTL_CHAT, "# 2.5 in the file; a recipe counts whole epochs, or steps"),
        (AXOLOTL_CHAT, "# datasets.2.type.format: Q: {instruction} A: -> write the prompt as a Jinja file"),
        (AXOLOTL_CHAT, "# hub_token: *** ->"),
        (LLAMA_FACTORY_FULL, "# trust_remote_code: true -> if the model needs its own code, read that code"),
        (LLAMA_FACTORY_QLORA, "# data/dataset_info.json does not describe identity here"),
        (TRL_LORA, "# datasets.0.weight: 0.5 -> a share of this data set"),
        (TRL_LORA, "# dataset_mixture.test_split_size: 1000 ->"),
        (TRL_LORA, "# the tokenizer's own template is used; for another one, save it as a Jinja file"),
        (TRL_LORA, "# push_to_hub: true -> Packhorse sends no weights anywhere"),
        (TRL_SHORT, "# default of TRL; the file does not set it"),
        (TORCHTUNE_LORA, "# shuffle: False -> rows are always shuffled, by seed"),
        (TORCHTUNE_LORA, "# optimizer.fused: True -> a recipe has no such field"),
    ],
)
def test_comments(text: str, comment: str) -> None:
    lines = [line.strip() for line in imported(text).splitlines()]
    assert [line for line in lines if line.startswith(comment)]


BEST = "load_best_model_at_end: true\nearly_stopping_patience: 3\nearly_stopping_threshold: 0.01\n"
MEASURED = "eval_strategy: steps\neval_steps: 100\nsave_steps: 50\n"


@pytest.mark.parametrize(
    ("lines", "is_kept"),
    [
        (MEASURED + "val_set_size: 0.1\n", (True, True)),
        ("val_set_size: 0.1\n", (False, False)),
        (MEASURED + "val_set_size: 0\n", (False, False)),
        (MEASURED.replace("50", "200") + "val_set_size: 0.1\n", (True, False)),
    ],
    ids=["measured", "no steps", "no rows", "fewer checkpoints"],
)
def test_early_stopping_and_the_best_checkpoint_need_a_validation_loss(lines: str, is_kept: tuple[bool, bool]) -> None:
    base = "base_model: org/m\ndatasets: [{path: org/d, type: alpaca}]\nadapter: lora\nlearning_rate: 1e-4\n"
    text = imported(base + BEST + lines, "axolotl")
    Path("my.yaml").write_text(text)
    recipe = load_recipe("my.yaml")
    stopping = recipe.evaluation.early_stopping
    assert (stopping and (stopping.patience, stopping.min_delta)) == ((3, 0.01) if is_kept[0] else None)
    assert recipe.checkpoint.publish == ("best" if is_kept[1] else "last")
    assert text.count("# early_stopping_") == (0 if is_kept[0] else 2)
    assert ("# load_best_model_at_end" in text) == (not is_kept[1])


def test_the_batch_counts_all_gpus() -> None:
    """Rows of a step = per device x accumulation x devices, as in the documentation of transformers."""
    Path("file.yaml").write_text(AXOLOTL_QLORA)
    assert main(["recipes", "import", "file.yaml", "--out", "my.yaml", "--gpus", "4"]) == 0
    assert load_recipe("my.yaml").batch.packs == 2 * 4 * 4


def test_what_a_trl_file_does_not_set_has_the_defaults_of_trl() -> None:
    text = "model_name_or_path: org/m\ndataset_name: org/d\nuse_peft: true\nlora_target_modules: [q_proj]\n"
    Path("my.yaml").write_text(imported(text))
    recipe, default, model = load_recipe("my.yaml"), SFTConfig.__dataclass_fields__, ModelConfig.__dataclass_fields__

    def trl(name: str) -> Any:
        return default[name].default

    assert recipe.optimizer.learning_rate == trl("learning_rate")
    assert recipe.optimizer.weight_decay == trl("weight_decay")
    assert recipe.optimizer.betas == (trl("adam_beta1"), trl("adam_beta2"))
    assert recipe.optimizer.epsilon == trl("adam_epsilon")
    assert recipe.optimizer.clip_norm == trl("max_grad_norm")
    assert recipe.schedule.name == trl("lr_scheduler_type")
    assert (recipe.schedule.warmup_ratio, recipe.schedule.warmup_steps) == (trl("warmup_steps"), None)
    assert (recipe.epochs, recipe.seed) == (trl("num_train_epochs"), trl("seed"))
    assert recipe.batch.packs == trl("per_device_train_batch_size") * trl("gradient_accumulation_steps")
    assert recipe.batch.length == trl("max_length")
    assert recipe.parallel.checkpointing == trl("gradient_checkpointing")
    method = recipe.method.model_dump()
    assert [method[name] for name in ("rank", "alpha", "dropout")] == [
        model[name].default for name in ("lora_r", "lora_alpha", "lora_dropout")
    ]


def test_what_a_llama_factory_file_does_not_set_has_the_defaults_of_transformers() -> None:
    Path("my.yaml").write_text(imported("model_name_or_path: org/m\nstage: sft\ndataset: a\n"))
    recipe, default = load_recipe("my.yaml"), TrainingArguments.__dataclass_fields__
    assert recipe.optimizer.learning_rate == default["learning_rate"].default
    assert recipe.optimizer.weight_decay == default["weight_decay"].default
    assert recipe.schedule.name == default["lr_scheduler_type"].default
    assert recipe.epochs == default["num_train_epochs"].default
    assert recipe.batch.packs == default["per_device_train_batch_size"].default


@pytest.mark.parametrize(
    ("value", "engine"),
    [
        ("zero3.json", "zero3"),
        ("ds_configs/zero_stage2_config.json", "zero2"),
        ("examples/deepspeed/ds_z0_config.json", "ddp"),
        ("examples/deepspeed/ds_z3_offload_config.json", "zero3_offload"),
        ("{zero_optimization: {stage: 1}}", "zero1"),
        ("mine.json", "zero2"),
    ],
)
def test_deepspeed(value: str, engine: str) -> None:
    Path("mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    text = f"model_name_or_path: org/m\nstage: sft\ndataset: a\ndeepspeed: {value}\n"
    Path("my.yaml").write_text(imported(text))
    assert load_recipe("my.yaml").parallel.engine == engine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: [", "file.yaml:1: the file is not YAML"),
        ("- a\n- b\n", "file.yaml contains a list"),
        ("", "file.yaml is empty"),
        ("compute_environment: LOCAL_MACHINE\n", "has the keys of no trainer that Packhorse knows"),
        ("name: x\nmodel: {id: m}\ndata: {sources: []}\n", "has the sections of a recipe"),
        ("base_model: org/m\nlearning_rate: 1e-4\n", "file.yaml names no data set"),
        ("base_model: org/m\ndatasets: []\n", "file.yaml names no data set"),
        ("base_model: org/m\ndatasets: [{type: alpaca}]\n", "names no rows"),
        ("datasets: [{path: a, type: alpaca}]\nsequence_len: 5\n", "file.yaml names no model"),
        ("base_model: m\ndatasets: [{path: a}]\nrl: grpo\n", "file.yaml:3: rl is grpo"),
        ("base_model: m\ndatasets: [{path: a}]\n", "optimizer.learning_rate is missing"),
        ("base_model: m\ndatasets: [{path: a}]\nlearning_rate: fast\n", "file.yaml:3: optimizer.learning_rate is fast"),
        ("base_model: m\ndatasets: [{path: a}]\nlearning_rate: 3\n", "file.yaml:3: optimizer.learning_rate is 3"),
        ("base_model: m\nbase_model: n\n", "`base_model` is given twice"),
    ],
)
def test_bad_files(text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file.yaml").write_text(text)
    before = sorted(folder.iterdir())
    assert main(["recipes", "import", "file.yaml", "--out", "new/my.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("fix:") == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no file"),
        (["absent.yml"], "absent.yml cannot be read"),
        (["file.yaml", "--out", "file.yaml"], "file.yaml already exists"),
        (["file.yaml", "--trainer", "axlotl"], "--trainer is axlotl"),
        (["file.yaml", "--gpus", "0"], "--gpus is 0"),
        (["file.yaml", "--out", "sets"], "sets already exists"),
    ],
)
def test_bad_commands(words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file.yaml").write_text(AXOLOTL_QLORA)
    before = sorted(folder.iterdir())
    assert main(["recipes", "import", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
    assert Path("file.yaml").read_text() == AXOLOTL_QLORA


def test_a_file_of_two_trainers_needs_the_name() -> None:
    text = "model_name_or_path: org/m\ndataset_name: org/d\nstage: sft\n"
    with pytest.raises(UserError, match="of LLaMA-Factory and of TRL"):
        imported(text)
    assert "a file of TRL" in imported(text, "trl")


def test_the_tables_name_what_a_recipe_takes() -> None:
    table, fields = trainers(), {path for path, _ in recipe_view().fields()}
    assert set(table["templates"].values()) <= {*NAMED_TEMPLATES, "tokenizer"}
    formats = [*table["formats"].values(), *(row[1] for row in table["builders"].values() if row[1])]
    assert set(formats) <= set(get_args(Format))
    for name in ("axolotl", "llamafactory", "trl", "torchtune"):
        assert [path for path in table[name]["defaults"] if path not in fields] == []
