"""Model, method and engine of another trainer's file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from packhorse.errors import UserError
from packhorse.recipe.importers.draft import Draft, field_of
from packhorse.recipe.rules.data import HUB_NAME
from packhorse.yaml_source.nodes import Node, parse_yaml, plain, show

OBJECTIVES = {"rm": "reward"} | {kind: kind for kind in ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "reward")}
BETA_OF = {"ipo": "tau", "orpo": "weight"}
ALL_LINEAR = {"all", "all-linear", "all_linear"}
TORCHTUNE_MODULES = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
ZERO_STAGE = re.compile(r"z(?:ero)?[_-]?(?:stage)?[_-]?([0-3])", re.IGNORECASE)


def translate_model(draft: Draft) -> None:
    """Translate the model, the method that trains it, and the engine.

    Raises:
        UserError: The file names no model, or an objective that Packhorse does not have.
    """
    _objective(draft)
    _model(draft)
    _method(draft)
    _engine(draft)


def _objective(draft: Draft) -> None:
    stage, rl = draft.take("stage"), draft.take("rl")
    given = rl if rl else stage if stage and stage.value not in ("sft", "pt") else None
    if given is None:
        return
    loss, beta = draft.take("pref_loss"), draft.take("pref_beta", "rl_beta", "beta", "dpo_beta")
    kind = OBJECTIVES.get(str(loss.value) if loss else "", OBJECTIVES.get(str(given.value).lower()))
    if kind is None:
        raise UserError(
            f"{'rl' if rl else 'stage'} is {show(given)}.",
            "Packhorse has no such objective, and the imported recipe would train something else.",
            f"keep {draft.title} for this run, or import a file with one of {', '.join(OBJECTIVES)}.",
            given.where,
        )
    draft.set("objective.kind", kind, given)
    if loss is not None and kind == "dpo":
        draft.set("objective.loss", loss)
    if beta is not None and kind != "reward":
        draft.set(f"objective.{BETA_OF.get(kind, 'beta')}", beta)
    draft.take("lora_dropout")
    draft.note("objective.kind", "without dropout, so that both answers are scored by the same weights")


def _model(draft: Draft) -> None:
    node = draft.take_field("model.id")
    if node is None:
        raise UserError(
            f"{draft.file} names no model.",
            "training starts from a model.",
            f"add {'checkpointer.checkpoint_dir' if draft.trainer == 'torchtune' else 'the model'} to {draft.file}, "
            "such as meta-llama/Llama-3.1-8B-Instruct or a folder.",
            f"{draft.file}:1",
        )
    name = str(node.value)
    if draft.trainer == "torchtune" and Path(name).name == "original":
        name = str(Path(name).parent)
        draft.note("model.path", "the folder in Hugging Face form, above the original weights")
    local = name.startswith(("/", ".", "~")) or Path(name).exists() or HUB_NAME.fullmatch(name) is None
    draft.set("model.path" if local else "model.id", name, node)
    revision = draft.take_field("model.revision")
    if revision is not None and local:
        draft.omit("model_revision", revision, "the model is a local folder")
    elif revision is not None:
        draft.set("model.revision", revision)
    if (trust := draft.take("trust_remote_code")) and trust.value is True:
        why = "if the model needs its own code, read that code, then set model.trust_remote_code: true"
        draft.omit("trust_remote_code", trust, why)


def _method(draft: Draft) -> None:
    kind, source = _kind(draft)
    bits = draft.take("quantization_bit")
    eight, four = draft.take("load_in_8bit"), draft.take("load_in_4bit")
    quantized = {4: four is not None and four.value is True, 8: eight is not None and eight.value is True}
    if bits is not None and bits.value in (4, 8):
        quantized[int(bits.value)] = True
    if kind == "lora" and any(quantized.values()):
        kind = "qlora"
    draft.set("method.kind", kind, source)
    if kind == "qlora" and quantized[8] and not quantized[4]:
        draft.set("method.quantization", "int8", eight or bits)
    if kind in ("lora", "qlora"):
        _lora(draft, kind)
    elif kind == "partial" and (layers := draft.take_field("method.last_layers")) is not None:
        draft.set("method.last_layers", layers)
    elif (node := four or eight or bits) and node.value is not False:
        draft.omit("quantization", node, f"method {kind} trains weights that are not quantised; see method: qlora")
    for name, (typed, node) in list(draft.keys.items()):
        field = field_of(name) or ""
        if field.startswith("method.") and kind in ("full", "partial") and (kind == "full" or "lora" in name):
            draft.take(name)
            why = f"method {kind} has no adapter"
            if field == "method.train":
                why = "every weight is trained; method: partial trains those that match patterns such as `*.mlp.*`"
            draft.omit(typed, node, why)


def _kind(draft: Draft) -> tuple[str, Node | None]:
    """Return the method, and the node that names it."""
    if draft.trainer == "trl":
        peft = draft.take("use_peft")
        return ("lora" if peft and peft.value is True else "full"), peft
    node = draft.take("adapter", "finetuning_type")
    text = str(node.value).lower() if node else ""
    if draft.trainer == "torchtune":
        builder = text.rpartition(".")[2]
        return ("qlora" if "qlora_" in builder else "lora" if "lora_" in builder else "full"), node
    if draft.trainer == "llamafactory" and text in ("", "full", "freeze"):
        return {"": "lora", "freeze": "partial"}.get(text, text), node
    if node is not None and text not in ("lora", "qlora"):
        draft.note("method.kind", f"{draft.title} uses {text} here; this is LoRA, the closest adapter")
    return ("lora" if node else "full"), node


def _lora(draft: Draft, kind: str) -> None:
    rank = draft.take_field("method.rank")
    if rank is not None:
        draft.set("method.rank", rank)
    alpha = draft.take_field("method.alpha")
    if alpha is None and rank is not None and type(rank.value) is int and draft.trainer == "llamafactory":
        draft.set("method.alpha", 2 * rank.value, rank, f"default of {draft.title}: twice the rank")
    elif alpha is not None:
        draft.set("method.alpha", alpha)
    for name in ("dropout", *(["double_quantization"] if kind == "qlora" else [])):
        nested = draft.take("bnb_4bit_use_double_quant") if name == "double_quantization" else None
        if (node := nested or draft.take_field(f"method.{name}")) is not None:
            draft.set(f"method.{name}", node)
    _target(draft)


def _target(draft: Draft) -> None:
    linear, output = draft.take("lora_target_linear"), draft.take("apply_lora_to_output")
    mlp = draft.take("apply_lora_to_mlp")
    node = draft.take_field("method.target")
    words = plain(node) if node else None
    names = [word.strip() for word in words.split(",")] if isinstance(words, str) else words
    if (linear and linear.value is True) or (isinstance(names, list) and ALL_LINEAR & set(map(str, names))):
        draft.set("method.target", "all-linear", linear or node)
    elif isinstance(names, list):
        names = [TORCHTUNE_MODULES.get(str(name), str(name)) for name in names]
        draft.set("method.target", names + (MLP if mlp and mlp.value is True else []), node)
    elif draft.trainer in ("trl", "axolotl"):
        draft.note(
            "method.kind",
            "the file names no modules, so that peft adapts its own choice, often q_proj and v_proj; "
            "without method.target, all linear layers get an adapter",
        )
    if output and output.value is True:
        draft.omit("apply_lora_to_output", output, "method.train_also: [lm_head] trains the output head whole")


def _engine(draft: Draft) -> None:
    deepspeed = draft.take("deepspeed", "deepspeed_config", "ds_config", "zero_stage")
    fsdp = [node for name in ("fsdp", "fsdp_config", "fsdp_version") if (node := draft.take(name))]
    offload = draft.take("fsdp_cpu_offload")
    if deepspeed is not None:
        engine = _zero_engine(deepspeed)
        draft.set("parallel.engine", engine, deepspeed, f"from `deepspeed: {show(deepspeed)}`")
    elif fsdp and not (len(fsdp) == 1 and fsdp[0].value in ("", [], False)):
        settings = json.dumps([plain(node) for node in fsdp]).lower()
        engine = "hsdp" if "hybrid" in settings else "fsdp2"
        if '"fsdp_offload_params": true' in settings or '"offload_params": true' in settings:
            engine = "zero3_offload"
            draft.note(
                "parallel.engine", "FSDP with offload in the file; this engine also keeps weights in host memory"
            )
        draft.set("parallel.engine", engine, fsdp[0])
    elif offload and offload.value is True:
        draft.set("parallel.engine", "zero3_offload", offload, "FSDP with offload in the file")
    elif draft.trainer in ("trl", "torchtune"):
        draft.note(
            "parallel.engine", f"{draft.title} chooses the engine on its command line; `packhorse plan` shows what fits"
        )
        draft.set("parallel.engine", "ddp")
    checkpointing = draft.take_field("parallel.checkpointing")
    if checkpointing is not None:
        draft.set("parallel.checkpointing", checkpointing.value is not False, checkpointing)


def _zero_engine(node: Node) -> str:
    """Return the engine for a DeepSpeed file, its content or a stage."""
    content: Any = plain(node)
    name = str(content)
    if isinstance(content, str) and Path(content).is_file():
        content = plain(parse_yaml(Path(content).read_text(encoding="utf-8"), content)[0])
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    found = ZERO_STAGE.search(name)
    stage = zero.get("stage", content) if zero or type(content) is int else int(found[1]) if found else 3
    offload = any("offload" in key for key in zero) if zero else "offload" in name
    return "ddp" if stage == 0 else "zero3_offload" if stage == 3 and offload else f"zero{stage}"
