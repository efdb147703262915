"""Loads a model from a hub, a folder or a fresh configuration, in the planned dtype, with packed attention.

`ModelRequest` holds everything that is needed to load the same base again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import (
    LoadStateDictConfig,
    _get_resolved_checkpoint_files,
    local_torch_dtype,
    set_quantized_state,
)
from transformers.quantizers.auto import get_hf_quantizer

from packhorse.errors import UserError
from packhorse.model.sharded import gathered, true_shape
from packhorse.model.streaming import StreamedWeights, open_weights
from packhorse.model.units import draw_score, score_weight
from packhorse.model_spec.stored_weights import refuse_incomplete, unreadable
from packhorse.model_spec.supported import require_embeddings, untrusted_code

# Otherwise transformers has a public service convert weights that the hub lacks as safetensors, and loads the result.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


Pieces = Mapping[int, tuple[int, ...]]
"""New token id -> the ids that the tokenizer split its text into before it was a token."""


@dataclass(frozen=True)
class Quantization:
    """Storage of frozen weights in 4 bits (Dettmers et al. 2023, arXiv 2305.14314) or 8 bits."""

    kind: Literal["nf4", "fp4", "int8"]
    double: bool
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class ModelRequest:
    """Which weights to load, and how to store them.

    Attributes:
        source: Folder or hub name; None for a fresh model.
        revision: Commit, tag or branch of a hub name.
        config: Configuration of a fresh model, with `model_type`.
        seed: Seed of fresh weights.
        dtype: Storage type.
        attention: Name for `attn_implementation`.
        quantization: Storage in few bits, None for plain weights.
        trust_remote_code: Run code that comes with the model.
        device: Device of the weights.
        new_tokens: Tokens whose embeddings start from those of their pieces.
        is_scored: Load a reward model, with a head for one score instead of the output head.
    """

    source: str | None
    revision: str | None
    config: Mapping[str, Any] | None
    seed: int
    dtype: torch.dtype
    attention: str
    quantization: Quantization | None
    trust_remote_code: bool
    device: torch.device
    new_tokens: Pieces = field(default_factory=dict)
    is_scored: bool = False

    @property
    def auto_class(self) -> Any:  # noqa: ANN401
        """transformers' class that chooses the architecture."""
        return AutoModelForSequenceClassification if self.is_scored else AutoModelForCausalLM

    @property
    def labels(self) -> dict[str, int]:
        """The configuration's number of labels, where the model has labels."""
        return {"num_labels": 1} if self.is_scored else {}


def load_model(request: ModelRequest, vocab_size: int) -> PreTrainedModel:
    """Load or create the model; its embedding must have a row for each of the tokenizer's `vocab_size` ids.

    Raises:
        UserError: No such model, weights that are not safetensors, code that the recipe does not trust, a folder
            without config.json, an unknown configuration key, or too few embeddings.
    """
    model = _fresh(request) if request.source is None else _pretrained(request)
    if request.new_tokens:
        add_rows(model, request.new_tokens, vocab_size)
    _refuse_few_embeddings(model, vocab_size, request.source is None)
    return model


def open_model(request: ModelRequest, vocab_size: int) -> StreamedWeights | None:
    """Create the model without memory and open its weights, which are then read one unit at a time.

    Returns:
        The weights with their model on the meta device; None for a fresh model, for one with remote code and for one
        that needs rows for new tokens: `load_model` loads these whole.

    Raises:
        UserError: See `load_model`; also where the checkpoint lacks weights, or holds unknown ones.
    """
    if request.source is None or request.new_tokens:
        return None
    with _reading(request):
        weights = _open(request)
    if weights is not None:
        _refuse_few_embeddings(weights.model, vocab_size, False)
    return weights


def add_rows(model: PreTrainedModel, pieces: Pieces, num_tokens: int) -> None:
    """Start each new token from the mean of its pieces' rows, in the embedding and in an untied output head.

    Nothing is drawn at random, so every rank and every engine starts from the same rows. Models often have spare
    rows that were never trained; the embedding only grows where it has too few.

    Args:
        model: Whole or under ZeRO-3's `zero.Init`; rows are [vocabulary, hidden width].
        pieces: Pieces of every new token.
        num_tokens: Number of tokens of the tokenizer, including the new ones.
    """
    embedding: Any = model.get_input_embeddings()
    if true_shape(embedding.weight)[0] < num_tokens:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        embedding = model.get_input_embeddings()
    weights = [embedding.weight]
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        weights.append(head.weight)
    for weight in weights:
        with gathered(weight, changed=True), torch.no_grad():
            for token, parts in pieces.items():
                weight[token] = weight[list(parts)].float().mean(0).to(weight.dtype)


def _refuse_few_embeddings(model: PreTrainedModel, vocab_size: int, is_fresh: bool) -> None:
    require_embeddings(true_shape(cast(Any, model.get_input_embeddings()).weight)[0], vocab_size, is_fresh)


def build_config(config: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the transformers configuration of a fresh model; a key that its class does not know is refused.

    Raises:
        UserError: `model_type` is absent or unknown, a key is unknown, or the values do not fit together.
    """
    fields = dict(config)
    kind = fields.pop("model_type", None)
    try:
        defaults = AutoConfig.for_model(str(kind))
    except ValueError as error:
        raise UserError(
            f"model.config.model_type is {kind!r}, which transformers does not know.",
            "it chooses the architecture of the fresh model.",
            "set it to a type such as llama, qwen2 or mistral.",
        ) from error
    # Two older names are no attributes, and transformers moves them into rope_parameters.
    moved = {"rope_theta", "rope_scaling"} if hasattr(defaults, "rope_parameters") else set()
    unknown = [name for name in fields if not hasattr(defaults, name) and name not in moved]
    if unknown:
        raise UserError(
            f"model.config has {', '.join(sorted(unknown))}, which a {kind} model does not read.",
            "transformers silently keeps an unknown key, and the model would not have what it says.",
            f"remove it, or see the fields of {type(defaults).__name__} in transformers.",
        )
    try:
        return type(defaults)(**fields)
    except Exception as error:  # each class checks its values in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(
            f"model.config is no configuration of a {kind} model: {reason}",
            "transformers checks the values against each other.",
            f"see the fields of {type(defaults).__name__} in transformers.",
        ) from error


def _fresh(request: ModelRequest) -> PreTrainedModel:
    assert request.config is not None
    config = build_config(request.config)
    config._attn_implementation = request.attention
    torch.manual_seed(request.seed)
    # The class itself, because under ZeRO-3 from_config draws the weights in another order, and the same recipe would
    # start from another model.
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if request.is_scored else MODEL_FOR_CAUSAL_LM_MAPPING
    config.update(request.labels)
    model: PreTrainedModel = mapping[type(config)](config)
    return model.to(request.device, request.dtype)


def _pretrained(request: ModelRequest) -> PreTrainedModel:
    assert request.source is not None
    quantized: dict[str, Any] = {}
    if request.quantization is not None:
        quantized = {"quantization_config": _bits_and_bytes(request), "device_map": {"": request.device}}
    with _reading(request):
        weight_files(request)
        model, loading_info = request.auto_class.from_pretrained(
            request.source,
            revision=request.revision,
            dtype=request.dtype,
            attn_implementation=request.attention,
            trust_remote_code=request.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **request.labels,
            **quantized,
        )
    # transformers has already excluded keys that are tied, derived or known leftovers.
    score = score_weight(model)
    refuse_incomplete(request.source, loading_info["missing_keys"], loading_info["unexpected_keys"], score)
    if score in loading_info["missing_keys"]:
        draw_score(model, request.seed, request.device, request.dtype)
    if not quantized:
        return cast(PreTrainedModel, model.to(request.device))
    _prepare_quantized(model)
    return cast(PreTrainedModel, model)


@contextmanager
def _reading(request: ModelRequest) -> Iterator[None]:
    """Turn what libraries raise for an unreadable model into a UserError."""
    try:
        yield
    except OSError as error:
        raise _unreachable(request, error) from error
    except SafetensorError as error:
        raise unreadable(str(request.source), error) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise untrusted_code(str(request.source)) from error


def _unreachable(request: ModelRequest, error: OSError) -> UserError:
    return UserError(
        f"the model {request.source} could not be loaded: {str(error).splitlines()[0]}",
        "it is neither in the local cache nor reachable, its files are incomplete, or they are not safetensors: "
        "a pickle, which runs code when it is opened, is never read.",
        "check the name and your access, download it with `hf download`, or set model.path to a local folder.",
    )


def _open(request: ModelRequest) -> StreamedWeights | None:
    """Do what `from_pretrained` does before it reads weights; return None for a model with remote code.

    transformers has no public call that stops there: `from_pretrained` loads the whole model on every rank.
    """
    assert request.source is not None
    config = AutoConfig.from_pretrained(
        request.source, revision=request.revision, trust_remote_code=request.trust_remote_code, **request.labels
    )
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    device_map = {"": request.device}
    bits = _bits_and_bytes(request) if request.quantization is not None else None
    quantizer, config, _ = get_hf_quantizer(config, bits, device_map, weights_only=True, user_agent={})
    # `set_quantized_state` keeps transformers from partitioning an empty model under ZeRO-3.
    with torch.device("meta"), set_quantized_state(), local_torch_dtype(request.dtype):
        model: Any = request.auto_class.from_config(config, dtype=request.dtype, attn_implementation=request.attention)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=request.dtype, device_map=device_map)
    files = weight_files(request)
    loading = LoadStateDictConfig(
        pretrained_model_name_or_path=request.source,
        device_map=device_map,
        dtype=request.dtype,
        dtype_plan=model._get_dtype_plan(request.dtype),
        hf_quantizer=quantizer,
        weight_mapping=get_model_conversion_mapping(model, None, quantizer),
    )
    weights = open_weights(model, request.source, files, loading, request.seed)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        _prepare_quantized(model)
    if model.can_generate():
        model.generation_config = _generation_config(request)
    return weights


def weight_files(request: ModelRequest) -> list[str]:
    """Return the local files with the weights; a pickle, which runs code when it is read, is refused."""
    revision = {"revision": request.revision}
    files, _ = _get_resolved_checkpoint_files(
        request.source, None, None, True, {}, is_remote_code=False, download_kwargs=revision
    )
    for file in files or []:
        if not file.endswith(".safetensors"):
            raise UserError(
                f"{request.source} keeps weights in {file}.",
                "only safetensors are read: a pickle runs code when it is opened.",
                "choose a model with safetensors weights.",
            )
    return files or []


def _generation_config(request: ModelRequest) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(request.source, revision=request.revision)
    except OSError:
        name = "config.json"
        return GenerationConfig.from_pretrained(
            request.source, config_file_name=name, revision=request.revision, _from_model_config=True
        )


def _prepare_quantized(model: PreTrainedModel) -> None:
    """Replace bitsandbytes' products, and prevent a forward pass from repacking the frozen weights.

    On a CPU with AVX-512 BF16, bitsandbytes rewrites them in the first pass without gradients, such as validation, with
    scales rounded to bfloat16: the base then changes during training, and widths that are not a multiple of the block
    end in an error.
    """
    # By name: importing bitsandbytes takes seconds, which no other model needs.
    import_module("packhorse.model.quantized_products").replace_products()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _bits_and_bytes(request: ModelRequest) -> BitsAndBytesConfig:
    quantization = request.quantization
    assert quantization is not None
    if quantization.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=quantization.compute_dtype,
        # FSDP shards parameters of one dtype only, so the 4-bit bytes are stored as that dtype.
        bnb_4bit_quant_storage=request.dtype,
    )
