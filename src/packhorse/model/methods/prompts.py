"""Prompt tuning and prefix tuning through peft, for packed documents and for generated answers.

Shapes: D documents, T their tokens in one row, P virtual tokens, H hidden width, K key/value heads, E head width.

peft puts one prompt before each row of a batch. A packed row holds D documents, and each must see the prompt as if the
document were alone (P = 2, documents `a` and `b`):

    prompt_tuning   p p a a a p p b b        row of T + D P embeddings; each document begins with the prompt
    prefix_tuning   a a a b b                row of T; attention sees P more keys and values before each document

In both the first token of a document has position P, as in peft's own forward pass and in `generate`.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from torch import Tensor, nn

from packhorse.errors import UserError
from packhorse.model.attention import Documents
from packhorse.model.methods.attach import Start
from packhorse.recipe.methods import PrefixTuningMethod, PromptTuningMethod


def attach(model: Any, method: PromptTuningMethod | PrefixTuningMethod, start: Start) -> nn.Module:  # noqa: ANN401
    """Freeze the model and add the prompt or prefix before each document.

    Lester et al. 2021 (arXiv 2104.08691), Li and Liang 2021 (arXiv 2101.00190, without its MLP).

    Raises:
        UserError: The layers differ in their key/value heads.
    """
    torch.manual_seed(start.seed)
    config = _prefix_config(model, method) if isinstance(method, PrefixTuningMethod) else _prompt_config(method, start)
    adapted = get_peft_model(model, config)
    # peft may make it in the base's dtype; trained parameters are fp32.
    adapted.prompt_encoder.float()
    forward = _with_prefix if isinstance(method, PrefixTuningMethod) else _with_prompt
    adapted.forward = MethodType(forward, adapted)
    return adapted  # type: ignore[no-any-return]


def _prompt_config(method: PromptTuningMethod, start: Start) -> PromptTuningConfig:
    by_text = method.text is not None
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=method.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if by_text else PromptTuningInit.SAMPLE_VOCAB,
        prompt_tuning_init_text=method.text,
        tokenizer_name_or_path=str(start.tokenizer) if by_text else None,
    )


def _prefix_config(model: Any, method: PrefixTuningMethod) -> PrefixTuningConfig:  # noqa: ANN401
    config = model.config.get_text_config()
    own = config.to_dict()
    if own.get("per_layer_config") or own.get("num_kv_shared_layers"):
        raise UserError(
            f"method is prefix_tuning, and the layers of a {config.model_type} model differ in their key/value heads.",
            "a prefix is one block of keys and values of the same shape in every layer.",
            "use prompt_tuning or lora.",
        )
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=method.virtual_tokens)


def _with_prompt(
    self: Any,  # noqa: ANN401
    input_ids: Tensor,
    position_ids: Tensor,
    documents: Documents,
    **other: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Replace the peft model's forward for a packed row; the logits are those of the row's own T tokens."""
    prompt = self.get_prompt(batch_size=1)[0]  # [P, H]
    embedded = self.word_embeddings(input_ids)[0]  # [T, H]
    prompt = prompt.to(embedded.dtype)
    parts = [part for document in torch.split(embedded, list(documents.lengths)) for part in (prompt, document)]
    device, width = embedded.device, len(prompt)
    number = torch.repeat_interleave(
        torch.arange(len(documents.lengths), device=device),
        documents.cu_seq_lens.diff().long(),
        output_size=embedded.shape[0],
    )
    own = torch.arange(embedded.shape[0], device=device) + width * (number + 1)  # new positions of the row's tokens
    shifts = width * torch.arange(len(documents.lengths) + 1, device=device, dtype=torch.int32)
    longer = replace(
        documents,
        lengths=tuple(length + width for length in documents.lengths),
        cu_seq_lens=documents.cu_seq_lens + shifts,
        max_length=documents.max_length + width,
    )
    positions = torch.arange(width, device=device).repeat(len(documents.lengths))
    placed = torch.empty(embedded.shape[0] + len(positions), dtype=torch.long, device=device)
    is_own = torch.zeros(len(placed), dtype=torch.bool, device=device)
    is_own[own] = True
    placed[own] = position_ids[0] + width
    placed.masked_scatter_(~is_own, positions)
    return self.base_model(
        inputs_embeds=torch.cat(parts)[None],
        position_ids=placed[None],
        documents=longer,
        logits_to_keep=own,  # the head sees the row without prompts, so that supervised positions stay valid
        **other,
    )


def _with_prefix(
    self: Any,  # noqa: ANN401
    input_ids: Tensor,
    position_ids: Tensor,
    documents: Documents,
    **other: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Replace the peft model's forward for a packed row; the prefix reaches attention with the documents."""
    cache = self.get_prompt(batch_size=1)
    prefixes = tuple((layer.keys, layer.values) for layer in cache.layers)  # [1, K, P, E] each
    return self.base_model(
        input_ids=input_ids,
        position_ids=position_ids + self.active_peft_config.num_virtual_tokens,
        documents=replace(documents, prefixes=prefixes),
        **other,
    )


def answer_with_prompt(model: PeftModel) -> None:
    """Make a peft model's forward work token by token on the rows of a batch, as `evaluate` generates.

    peft's own forward puts the prompt before the tokens of every call, even with a cache, and at positions that count a
    row's padding; only its `generate` avoids that.
    """
    model.forward = MethodType(_answer, model)


def _answer(
    self: Any,  # noqa: ANN401
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,  # noqa: ANN401
    use_cache: bool = False,
    **other: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Map input_ids [B, T], mask [B, tokens so far] and positions [B, T] without the prompt to logits [B, T, V]."""
    width = self.active_peft_config.num_virtual_tokens
    batch, length = input_ids.shape
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(batch, width), attention_mask], 1)
    if position_ids is None:
        # The cache counts the prompt among the earlier tokens.
        before = past_key_values.get_seq_length() - width if past_key_values is not None else 0
        position_ids = torch.arange(before, before + length, device=input_ids.device).expand(batch, -1)
    rest = {"attention_mask": attention_mask, "use_cache": use_cache, **other}
    if past_key_values is not None:
        return self.base_model(
            input_ids=input_ids, position_ids=position_ids + width, past_key_values=past_key_values, **rest
        )
    prompt = self.get_prompt(batch_size=batch)
    if not isinstance(prompt, Tensor):
        rest["use_cache"] = True  # the prefix is in the cache
        return self.base_model(input_ids=input_ids, position_ids=position_ids + width, past_key_values=prompt, **rest)
    embedded = self.word_embeddings(input_ids)
    own = torch.arange(width, device=input_ids.device).expand(batch, -1)
    output = self.base_model(
        inputs_embeds=torch.cat([prompt.to(embedded.dtype), embedded], 1),
        position_ids=torch.cat([own, position_ids + width], 1),
        **rest,
    )
    output.logits = output.logits[:, -length:]
    return output
