"""A tiny tokenizer, tiny random models, and prepared data written as `packhorse prepare` writes it."""

from pathlib import Path

import pytest
import torch
from evaluate_cases import ROWS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from packhorse.evaluate.held_out import trained_form
from packhorse.model.load import ModelRequest
from packhorse.recipe.schema import DataSection, Source
from prepared import write_prepared
from quickstart_corpus.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for a second thread
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [message["content"] for row in ROWS for message in row["messages"]]
    save_tokenizer(train_tokenizer([*texts, "user assistant system\n"]), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_config(tokenizer):
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def tiny(tiny_config):
    """A random model whose greedy answers vary."""
    torch.manual_seed(7)
    return LlamaForCausalLM(tiny_config).eval()


@pytest.fixture
def request_of():
    def make(folder: Path) -> ModelRequest:
        return ModelRequest(
            source=str(folder),
            revision=None,
            config=None,
            seed=0,
            dtype=torch.float32,
            attention="eager",
            quantization=None,
            trust_remote_code=False,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def form(tokenizer):
    return trained_form(tokenizer, DataSection(sources=[Source(path="rows.jsonl")]))


@pytest.fixture
def write_data(tmp_path, tokenizer):
    """Writes prepared data: name of a split to its rows. Supervised: the answer and its stop token."""

    def documents(rows):
        for row in rows:
            encoded = tokenizer.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            yield encoded["input_ids"], encoded["assistant_masks"], row

    def write(**splits) -> Path:
        made = {name: list(documents(rows)) for name, rows in splits.items()}
        return write_prepared(tmp_path / "data", made, len(tokenizer), fields=("language",))

    return write
