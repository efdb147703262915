"""Greedy answers, in batches.

Shapes: B rows still being answered, T prompt tokens (padded left), V vocabulary.

This does not call `model.generate`, which takes sampling and penalties from the model's generation_config and keeps
computing finished rows until the last row ends. Here the search must be greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.answer_cache import Answer, AnswerCache, answer_key
from packhorse.evaluate.models import Model
from packhorse.evaluate.ranks import ALONE, Ranks

Message = dict[str, Any]
"""A turn as templates take it: role and content; optionally tool_calls, reasoning_content and name."""
Tools = Sequence[dict[str, Any]]
"""Definitions of tools, in OpenAI's form."""


def answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    limits: Sequence[int],
    batch_size: int = 64,
    tools: Sequence[Tools] | None = None,
    cache: AnswerCache | None = None,
    weights: str = "",
) -> list[Answer]:
    """Return one greedy answer per prompt, in the order of the prompts.

    Args:
        model: Model in eval mode.
        tokenizer: Tokenizer with a chat template.
        prompts: Chats that end before the answer.
        limits: Largest number of new tokens, per prompt.
        batch_size: Prompts answered at once.
        tools: Tools that may be called, per prompt; None means none.
        cache: Answers that are known; new ones are added after each batch.
        weights: Fingerprint of the weights of the model, part of the key of each answer.
    """
    tools_of = tools or [()] * len(prompts)
    ids = [prompt_ids(tokenizer, prompt, offered) for prompt, offered in zip(prompts, tools_of, strict=True)]
    return answers_to(model, tokenizer, ids, limits, batch_size, cache, weights)


def answers_to(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    batch_size: int = 64,
    cache: AnswerCache | None = None,
    weights: str = "",
    ranks: Ranks = ALONE,
) -> list[Answer]:
    """Return one greedy answer per prompt of token ids, equal on every rank; see `answers`."""
    cache = cache or AnswerCache()
    stop_ids = stop_tokens(model, tokenizer)
    keys = [answer_key(weights, prompt, limit, stop_ids) for prompt, limit in zip(prompts, limits, strict=True)]
    unknown = {key: row for row, key in enumerate(keys) if cache.get(key) is None}
    order = sorted(unknown.values(), key=lambda row: (limits[row], len(prompts[row])))
    num_rows = ranks.size * max(1, min(batch_size, -(-len(order) // ranks.size)))
    for start in range(0, len(order), num_rows):
        rows = order[start : start + num_rows]
        own = range(ranks.rank, len(rows), ranks.size)
        asked = [rows[at] for at in own]
        found = greedy(model, [prompts[row] for row in asked], [limits[row] for row in asked], stop_ids, ranks)
        # 0 is no token: ranks have different rows, and their sum has all of them.
        said = torch.zeros(len(rows), max(limits[row] for row in rows), dtype=torch.int64)
        for at, tokens in zip(own, found, strict=True):
            said[at, : len(tokens)] = torch.tensor(tokens) + 1
        tokens_of = ([token - 1 for token in line if token] for line in ranks.total(said).tolist())
        cache.add({keys[row]: _answer(tokenizer, tokens, stop_ids) for row, tokens in zip(rows, tokens_of)})
    known = [cache.get(key) for key in keys]
    return [answer for answer in known if answer is not None]


def _answer(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop_ids: frozenset[int]) -> Answer:
    ended = bool(tokens) and tokens[-1] in stop_ids
    return Answer(tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True), ended)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
    """Return the token ids of a chat, up to the start of the assistant's answer."""
    return _ids(tokenizer, _rendered(tokenizer, messages, tools, add_generation_prompt=True))


def template_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: Message, tools: Tools = ()
) -> str | None:
    """Return the text that a model must generate for an answer. Each template writes tool calls in its own form.

    Returns:
        Text without special tokens, up to the stop token; None if the template writes nothing for the answer, or
        writes the prompt differently before it.
    """
    ids = answer_ids(tokenizer, prompt, answer, tools)
    if ids is None:
        return None
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text if text.strip() else None


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: Message, tools: Tools = ()
) -> list[int] | None:
    """Return the token ids of an answer behind its prompt, up to and including the stop token.

    Returns:
        Token ids; None if the template writes the prompt differently before the answer.
    """
    before = _rendered(tokenizer, prompt, tools, add_generation_prompt=True)
    whole = _rendered(tokenizer, [*prompt, answer], tools, add_generation_prompt=False)
    if not whole.startswith(before):
        return None
    ids = _ids(tokenizer, whole[len(before) :])
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool
) -> str:
    text: str = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own
    return ids


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: those of the tokenizer and of the model's generation_config."""
    named = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return frozenset(ids - {None})


@torch.inference_mode()
def greedy(
    model: Model,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    stop_ids: frozenset[int],
    ranks: Ranks = ALONE,
) -> list[list[int]]:
    """Continue each prompt with the most likely token until a stop token or its limit.

    Args:
        model: Model in eval mode.
        prompts: Token ids; lengths may differ.
        limits: Largest number of new tokens, per prompt.
        stop_ids: Tokens that end an answer.
        ranks: Processes with other prompts; with sharded weights they compute until all of them have ended.

    Returns:
        New tokens per prompt, including the stop token if there is one.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    ids, mask = _padded_left(prompts, ranks.device_of(model))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    while ranks.any(bool(active)):
        if not active:
            ranks.idle_pass(model)
            continue
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)  # [B, 1]
        for row, token in zip(active, ids[:, 0].tolist()):
            outputs[row].append(token)
        keep = [
            slot
            for slot, row in enumerate(active)
            if outputs[row][-1] not in stop_ids and len(outputs[row]) < limits[row]
        ]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if 0 < len(keep) < len(active):
            chosen = torch.tensor(keep, device=ids.device)
            cache.batch_select_indices(chosen)
            ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
        active = [active[slot] for slot in keep]
    return outputs


@torch.inference_mode()
def stream(model: Model, prompt: list[int], limit: int, stop_ids: frozenset[int]) -> Iterator[int]:
    """Yield up to `limit` most likely tokens, without the stop token; the model is in eval mode."""
    ids = torch.tensor([prompt], device=model.device)
    cache: Any = None
    for _ in range(limit):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        token = int(ids.item())
        if token in stop_ids:
            return
        yield token


def _padded_left(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [B, T]; the mask hides the padding, so its id does not matter."""
    length = max(map(len, prompts), default=0)
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
