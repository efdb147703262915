"""Batched answers against transformers' own generate, one prompt at a time."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from packhorse.evaluate.generate import answers, greedy, prompt_ids, stop_tokens, stream

PROMPTS = [[{"role": "user", "content": text}] for text in ("say apple", "di", "say pear and plum and fig", "x" * 30)]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def generate_alone(model, ids, limit, stops):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def common_stop(model, ids):
    """A token that ends some answers early and others not at all."""
    said = [generate_alone(model, row, 12, {299}) for row in ids]
    return next(token for token in said[0][2:] if sum(token in row for row in said) < len(said))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_batch_says_what_each_row_says_alone(kind, tiny):
    torch.manual_seed(3)
    model = {
        "llama": lambda: tiny,
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        ).eval(),  # its positions are absolute: a shift by the padding would show
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval(),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=8)).eval(),
    }[kind]()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 299, (length,), generator=generator).tolist() for length in (3, 17, 9, 1, 12)]
    stops = frozenset({common_stop(model, ids)})
    limits = [12, 5, 12, 20, 1]
    alone = [generate_alone(model, row, limit, stops) for row, limit in zip(ids, limits)]
    assert greedy(model, ids, limits, stops) == alone
    assert len({len(row) for row in alone}) > 2  # rows end at different times, so rows were dropped from the batch
    assert len({token for row in alone for token in row}) > 5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_keep_the_order_of_the_prompts(tiny, tokenizer, batch_size):
    stops = stop_tokens(tiny, tokenizer)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        expected.append(tokenizer.decode(generate_alone(tiny, ids, 9, stops), skip_special_tokens=True))
    found = answers(tiny, tokenizer, PROMPTS, [9] * len(PROMPTS), batch_size)
    assert [answer.text for answer in found] == expected
    assert len(set(expected)) == len(expected)


def test_an_answer_that_is_cut_has_not_ended(tiny, tokenizer):
    (cut,) = answers(tiny, tokenizer, PROMPTS[:1], [4])
    ids = prompt_ids(tokenizer, PROMPTS[0])
    tiny.generation_config.eos_token_id = [generate_alone(tiny, ids, 4, {299})[3]]
    (ended,) = answers(tiny, tokenizer, PROMPTS[:1], [4])
    assert not cut.ended
    assert ended.ended


def test_stop_tokens_are_those_of_tokenizer_and_model(tiny, tokenizer):
    tiny.generation_config.eos_token_id = [3, 4]
    assert stop_tokens(tiny, tokenizer) == {3, 4, tokenizer.eos_token_id}
    tiny.generation_config.eos_token_id = None
    assert stop_tokens(tiny, tokenizer) == {tokenizer.eos_token_id}


def test_sampling_and_penalties_of_the_models_folder_change_nothing(tiny, tokenizer):
    plain = answers(tiny, tokenizer, PROMPTS, [9] * 4)
    tiny.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    assert answers(tiny, tokenizer, PROMPTS, [9] * 4) == plain


def test_a_stream_says_the_same_without_the_stop_token(tiny, tokenizer):
    ids = prompt_ids(tokenizer, PROMPTS[0])
    free = generate_alone(tiny, ids, 9, {299})
    assert list(stream(tiny, ids, 9, frozenset())) == free
    at = next(at for at in range(2, 9) if free[at] not in free[:at])
    assert list(stream(tiny, ids, 9, frozenset({free[at]}))) == free[:at]


def test_no_prompts_no_answers(tiny, tokenizer):
    assert answers(tiny, tokenizer, [], []) == []
