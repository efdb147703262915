"""Measures any causal language model of transformers on fake tensors: its parameters, and what a pass keeps.

The real model, with the real method attached, runs forward on fake tensors, which have shapes and no data, and autograd
reports what it would save. `recorder.py` substitutes what fake tensors of the CPU cannot show. The bytes that a pass
keeps are linear in its tokens: two short passes give them for any length.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from packhorse.errors import UserError
from packhorse.estimate.measure.recorder import AttentionCall, PassRecorder, RunAsPlanned, WeightUse, attend
from packhorse.model.attention import Documents, register_kernel
from packhorse.model.methods.attach import Start, attach
from packhorse.model.units import layers_of, units_of
from packhorse.model_spec.measured_model import (
    CPU_FLOAT32,
    KeptBytes,
    LayerKeptBytes,
    LinearBytes,
    MeasuredModel,
    Names,
    NotMeasuredError,
    Parameter,
    PassFormats,
)
from packhorse.model_spec.parameters import Shape
from packhorse.model_spec.supported import own_attention
from packhorse.recipe.methods import LoraMethod, Method, PromptTuningMethod

DOCUMENT_TOKENS = (64, 128)
"""Document lengths of the two passes."""
KERNEL = "measured"
DTYPES = {4: torch.float32, 2: torch.bfloat16}


@cache
def measure_shape(configuration: str) -> Shape:
    """Build the model of a configuration on torch's meta device and measure it.

    Args:
        configuration: config.json as text.

    Raises:
        NotMeasuredError: transformers has no such model, or it cannot be built or run on fake tensors.
        UserError: Packed documents cannot be trained with it.
    """
    fields = json.loads(configuration)
    with _library_errors(fields):
        model = _build(fields, torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            recorder = _forward(model, model, CPU_FLOAT32, DOCUMENT_TOKENS[0])
    return _shape(fields, model, recorder)


class FakeTensorMeter:
    """Measures forward passes of the model of one configuration, each combination of method and formats once."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._measured: dict[tuple[str, PassFormats], KeptBytes] = {}

    def kept(self, method: Method, formats: PassFormats) -> KeptBytes:
        """Return the bytes that a pass up to the output head keeps for the backward pass.

        Raises:
            UserError: The method cannot be used on this model.
            NotMeasuredError: The model cannot run on fake tensors under this method.
        """
        key = (method.model_dump_json(), formats)
        if key not in self._measured:
            with _library_errors(self._fields):
                self._measured[key] = self._measure(method, formats)
        return self._measured[key]

    def _measure(self, method: Method, formats: PassFormats) -> KeptBytes:
        base = _build(self._fields, DTYPES[formats.base])
        model: Any = attach(base, _without_initialization(method), Start(), autocast=formats.autocast)
        for parameter in model.parameters():
            if parameter.requires_grad and not method.trains_base:
                parameter.data = parameter.data.to(DTYPES[formats.adapter])
        if formats.input_gradients:
            model.enable_input_require_grads()
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            short, long = (_forward(base, model.train(), formats, tokens) for tokens in DOCUMENT_TOKENS)
        return _kept(short, long)


def _without_initialization(method: Method) -> Method:
    """Return a method of the same sizes whose initialization reads neither weights nor texts."""
    if isinstance(method, LoraMethod):
        return method.model_copy(update={"initialization": "default"})
    return method.model_copy(update={"text": None}) if isinstance(method, PromptTuningMethod) else method


@contextmanager
def _library_errors(fields: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error that a library raises about the model into the reason why it is not measured."""
    # Libraries' logs and warnings about a model are for those who run it.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        kind = fields.get("model_type")
        if isinstance(error, KeyError) and error.args == (f"packhorse_{KERNEL}",):
            raise own_attention(str(kind)) from error
        first = (str(error).strip().splitlines() or [""])[0]
        raise NotMeasuredError(
            f"a {kind} model cannot be built or run without its weights ({type(error).__name__}: {first})"
        ) from error
    finally:
        logging.disable(before)


def _own_attention(kind: object, layer: int) -> str:
    return (
        f"layer {layer} of a {kind} model does not run its attention through transformers' interface, which packed "
        "documents need"
    )


def _build(fields: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    kind = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise NotMeasuredError(f"model_type is {kind!r}, which transformers does not know")
    config = CONFIG_MAPPING[kind].from_dict(dict(fields))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotMeasuredError(f"transformers has no causal language model of model_type {kind!r}")
    config._attn_implementation = register_kernel(KERNEL, attend)
    config.dtype = dtype
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return model.to(dtype).train()


def _make_fake(model: nn.Module) -> None:
    """Replace the tensors of a model on the meta device, which autocast does not support, by fake CPU tensors."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in known:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                known[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype) if buffer is not None else None


class _HeadReachedError(Exception):
    """Ends a pass where the loss begins."""


def _forward(base: Any, model: Any, formats: PassFormats, document_tokens: int) -> PassRecorder:  # noqa: ANN401
    """Run one forward pass up to the output head.

    Args:
        base: The model without a method around it, which may be `model` itself.
        model: The module that is called.
        formats: Number formats and kernels.
        document_tokens: Length of each of `formats.documents` documents.
    """
    tokens = document_tokens * formats.documents
    layers = [base.get_submodule(name) for name in layers_of(base)]
    ids = torch.zeros(1, tokens, dtype=torch.long)
    recorder = PassRecorder(model, base.get_output_embeddings(), formats)
    recorder.ignore(ids)
    documents = Documents(
        (document_tokens,) * formats.documents, torch.zeros(formats.documents + 1, dtype=torch.int32), document_tokens
    )

    def end(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        recorder.head_input = given[0]
        raise _HeadReachedError

    with ExitStack() as stack:
        hook = base.get_output_embeddings().register_forward_pre_hook(end)
        stack.callback(hook.remove)
        first_alike: dict[Any, int] = {}
        for index, layer in enumerate(layers):
            stack.enter_context(_RecordedLayer(layer, index, recorder, first_alike))
        if formats.autocast:
            stack.enter_context(torch.autocast("cpu", DTYPES[formats.compute]))
        stack.enter_context(RunAsPlanned(recorder))
        stack.enter_context(saved_tensors_hooks(recorder.keep, lambda tensor: tensor))
        try:
            model(input_ids=ids, position_ids=ids, documents=documents, use_cache=False)
        except _HeadReachedError:
            return recorder
    raise NotMeasuredError("the model's forward pass does not end in its output head")


class _RecordedLayer:
    """Reports the start and end of a layer to the recorder; of equal layers only the first is run."""

    def __init__(self, layer: nn.Module, index: int, recorder: PassRecorder, first_alike: dict[Any, int]) -> None:
        self._layer, self._index, self._recorder, self._first_alike = layer, index, recorder, first_alike
        self._identity = _identity_of(layer)

    def __enter__(self) -> None:
        self._forward = self._layer.forward
        self._layer.forward = self._run

    def __exit__(self, *_: object) -> None:
        self._layer.forward = self._forward

    def _run(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        key = (self._identity, hidden.dtype, hidden.requires_grad)
        self._recorder.begin(self._index, hidden, (args[1:], kwargs))
        first = self._first_alike.setdefault(key, self._index)
        if first != self._index:
            return _same_form(self._recorder.repeat(self._index, first))
        out = self._forward(*args, **kwargs)
        self._recorder.end(self._index, out)
        return out


def _same_form(out: Any) -> Any:  # noqa: ANN401
    """Return new tensors with the shape, type and gradient flag of the layer's that was run."""
    if isinstance(out, tuple):
        return tuple(_same_form(each) for each in out)
    if not isinstance(out, Tensor):
        return out
    return torch.empty(out.shape, dtype=out.dtype, requires_grad=out.requires_grad)


def _identity_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return all that distinguishes layers, without their index: modules, settings, weights and what is trained."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        found.append((name, type(module), *sorted((k, v) for k, v in plain.items() if not k.startswith("layer_i"))))
    for name, parameter in layer.named_parameters():
        found.append((name, parameter.shape, parameter.dtype, parameter.requires_grad))
    return tuple(found)


def _kept(short: PassRecorder, long: PassRecorder) -> KeptBytes:
    def line(part: str, unit: int | None) -> LinearBytes:
        few, many = short.bytes_of(unit, part), long.bytes_of(unit, part)
        slope = (many - few) / (long.tokens - short.tokens)
        return LinearBytes(few - slope * short.tokens, slope)

    def width(hidden: Tensor) -> LinearBytes:
        return LinearBytes(0.0, hidden.shape[-1] * hidden.element_size())

    layers = tuple(
        LayerKeptBytes(line("attention", index), line("rest", index), width(hidden))
        for index, hidden in enumerate(long.inputs)
    )
    assert long.head_input is not None
    return KeptBytes(
        line("rest", None),
        line("shared", None),
        layers,
        line("rest", len(layers)),
        long.head_input.element_size(),
        long.head_input.requires_grad,
    )


# --- parameters and their order -----------------------------------------------------------------------


def _shape(fields: Mapping[str, Any], model: Any, recorder: PassRecorder) -> Shape:  # noqa: ANN401
    names, calls = _names(model), recorder.attended
    layers = len(recorder.inputs)
    without = [index for index in range(layers) if index not in calls]
    if not calls:
        raise own_attention(str(fields["model_type"]))
    if without:
        raise NotMeasuredError(_own_attention(fields["model_type"], without[0]))
    parameters = tuple(_parameters(model))
    stages, queries = _stages(recorder.uses, names)
    first: AttentionCall = calls[0]
    head = model.get_output_embeddings().weight
    inside = [each for each in parameters if names.layer_of(each.name) is not None]
    after = [each.shape[1] for each in inside if each.linear and stages.get(names.in_layer(each.name), 0) > queries + 1]
    experts = [each for each in inside if len(each.shape) == 3 and ".experts." in each.name]
    hidden = recorder.inputs[0].shape[-1]
    return Shape(
        family=str(fields["model_type"]),
        vocabulary=head.shape[0],
        hidden=hidden,
        mlp_width=max(after, default=hidden),
        layers=layers,
        heads=first.heads,
        key_value_heads=first.key_value_heads,
        head_width=first.width,
        tied=model.get_input_embeddings().weight is head,
        attention_bias=False,
        mlp_bias=False,
        experts=experts[0].shape[0] if experts else 0,
        active_experts=recorder.active_experts,
        expert_width=min((side for each in experts for side in each.shape[1:] if side != hidden), default=hidden),
        sparse_layers=frozenset(index for each in experts if (index := names.layer_of(each.name)) is not None),
        windows=tuple(calls[index].window for index in range(layers)),
        names=names,
        measured_model=MeasuredModel(
            parameters, stages, queries, _norm_widths(inside, names), first.scores_kept, FakeTensorMeter(fields)
        ),
    )


def _names(model: Any) -> Names:  # noqa: ANN401
    layers = layers_of(model)
    prefixes = {name.rpartition(".")[0] for name in layers}
    if len(prefixes) != 1 or [name.rpartition(".")[2] for name in layers] != [str(at) for at in range(len(layers))]:
        raise NotMeasuredError(f"its decoder layers are not in one list ({', '.join(sorted(prefixes)) or 'none'})")
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tail = units_of(model)[0 if embedding.weight is head.weight else -1].names
    norm = next((name for name in tail if model.get_submodule(name) not in (embedding, head)), "")
    return Names(by_id[id(embedding.weight)], by_id[id(head.weight)], f"{norm}.weight", f"{prefixes.pop()}.")


def _parameters(model: Any) -> Iterator[Parameter]:  # noqa: ANN401
    head = model.get_output_embeddings()
    linear: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            # GPT-2's own linear layer stores its weight transposed.
            linear[id(module.weight)] = isinstance(module, Conv1D)
    for name, parameter in model.named_parameters():
        transposed = linear.get(id(parameter))
        shape = tuple(parameter.shape)
        yield Parameter(name, shape[::-1] if transposed else shape, transposed is not None)


def _stages(uses: list[WeightUse], names: Names) -> tuple[dict[str, int], int]:
    """Return the stage of each weight in a layer, and the stage after which attention runs."""
    stages: dict[str, int] = {}
    queries = stage = last = layer = -1
    for use in uses:
        if use.layer != layer:
            layer, stage, last = use.layer, -1, -1
        if use.name is None:
            queries = stage
            continue
        if use.input != last:
            stage, last = stage + 1, use.input
        name = names.in_layer(use.name)
        stages.setdefault(name, stage)
        stages.setdefault(f"{name.removesuffix('.weight')}.bias", stage)
    return stages, queries


def _norm_widths(inside: list[Parameter], names: Names) -> int:
    """Return the elements per token that pass through the norms of the first layer."""
    weights = (each for each in inside if names.layer_of(each.name) == 0 and each.name.endswith(".weight"))
    return sum(each.size for each in weights if len(each.shape) == 1)
