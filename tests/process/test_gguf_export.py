"""`packhorse export --to gguf` of a run that was trained: proven, measured, and refused where it cannot be."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gguf_models import SMALL
from packhorse.cli.main import main
from packhorse.export.gguf import prove
from packhorse.export.gguf.convert import Source, write_gguf
from packhorse.export.gguf.llama_cpp import LlamaCpp
from packhorse.export.gguf.prove import HARD_TEXTS
from packhorse.export.gguf.vocabulary import vocabularies_of
from packhorse.quickstart.files import materialise
from shared_folder import shared
from tiny import TINY, write_tiny

MODEL = {"config": {**TINY["model"]["config"], "hidden_size": 64}, "tokenizer": "builtin:tokenizer"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    here = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main(["train", str(write_tiny(here, model=MODEL, steps=12))]) == 0
    return here


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    return folder / "runs" / "tiny"


def test_each_file_is_proven_and_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/tiny", "--to", "gguf", "--quantize", "F16,Q8_0,Q4_0"]) == 0
    shown = capsys.readouterr().out
    out = run / "export" / "gguf"
    figures = json.loads((out / "gguf.json").read_text())
    assert figures["proof"]["num_texts"] > 50
    assert figures["proof"]["largest_difference"] < 5e-5
    files = {file["type"]: file for file in figures["files"]}
    assert sorted(path.name for path in out.iterdir()) == [
        "Modelfile",
        "gguf.json",
        *(f"tiny-{name}.gguf" for name in ("F16", "Q4_0", "Q8_0")),
    ]
    assert abs(files["F16"]["kl_nats"]) < files["Q8_0"]["kl_nats"] < files["Q4_0"]["kl_nats"]
    assert files["F16"]["outcome"] == files["Q8_0"]["outcome"] == "kept"
    assert "kept" in shown
    assert "ollama create tiny -f runs/tiny/export/gguf/Modelfile" in shown
    modelfile = (out / "Modelfile").read_text().splitlines()
    assert {"FROM ./tiny-F16.gguf", "PARAMETER num_ctx 256", 'PARAMETER stop "<|im_end|>"'} <= set(modelfile)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    with LlamaCpp(out / "tiny-F16.gguf", 256) as llama:
        tokens, _ = llama.complete(prompt, 24)
    import torch

    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert tokens[:8] == expected[:8]


def test_an_adapter_is_merged_and_then_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"method": {"kind": "lora", "rank": 4}, "model": {"path": str(run / "model")}, "steps": 4}
    recipe = write_tiny(tmp_path, name="adapter", **words)
    assert main(["train", str(recipe)]) == 0
    assert main(["export", "runs/adapter"]) == 0
    assert "base to adapter" in capsys.readouterr().out
    merged = run.parent / "adapter" / "export" / "merged"
    assert json.loads((merged / "merge.json").read_text())["proof"]["largest_difference"] < 1e-4
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == 2  # <|im_end|>
    monkeypatch.setattr("packhorse.export.merge.export.export_merged", None)  # the merge above is used again
    assert main(["export", "runs/adapter", "--to", "gguf"]) == 0
    assert "kept" in capsys.readouterr().out


def test_a_file_that_loses_too_much_ends_with_code_3(run: Path, tmp_path: Path) -> None:
    """The norms of a copy shrink where the weights behind them grow: the same model, which 4 bits cannot hold."""
    shutil.copytree(run, tmp_path / "harsh")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, behind in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight.data[::32] /= 300  # one weight in each block of 32
            for linear in behind:
                linear.weight.data[:, ::32] *= 300
    model.save_pretrained(tmp_path / "harsh" / "model")
    assert (
        main(["export", str(tmp_path / "harsh"), "--to", "gguf", "--quantize", "Q4_0", "--out", str(tmp_path / "out")])
        == 3
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "gguf", "--quantize", "Q4_K_XL"], "Q4_K_XL is no type of GGUF file that is written here"),
        (["--to", "onnx"], "--to is onnx"),
    ],
)
def test_mistakes_write_nothing(
    run: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "runs/tiny", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_tokens_than_training_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove.LlamaCpp, "tokenize", lambda _, text: [1] * len(text))
    assert main(["export", "runs/tiny", "--to", "gguf", "--out", str(tmp_path)]) == 2
    assert "cuts texts into other tokens than training did" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def random_texts(count: int) -> list[str]:
    """Texts of all planes of Unicode, with runs of spaces, digits and marks that combine."""
    ranges = [(0x20, 0x7E), (0xA0, 0x36F), (0x370, 0x97F), (0xE00, 0x11FF), (0x2000, 0x20CF), (0x3040, 0x9FFF)]
    ranges += [(0xAC00, 0xD7A3), (0xFE00, 0xFFEF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF), (0, 0x1F)]
    draw = random.Random(0)

    def word() -> str:
        low, high = draw.choice(ranges)
        letters = [chr(draw.randint(low, high)) for _ in range(draw.randint(1, 4))]
        # Libraries know other versions of Unicode: the newest letters are letters in some of them only.
        text = "".join(letter for letter in letters if unicodedata.category(letter) != "Cn")
        return text + draw.choice(["", "", " ", "  ", "\n", "\t", " '", "'s ", " 12", "!!"])

    return ["".join(word() for _ in range(draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", ["qwen2-151k", "mistral-v3-32768", "gpt2-50k", "minimind-6k", "stories", "quickstart"])
def test_llama_cpp_reads_real_rows_and_random_unicode_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    where = {
        "stories": lambda: shared("models/stories260K-llama"),
        "quickstart": lambda: materialise("tokenizer", tmp_path / "builtin"),
    }
    tokenizer = AutoTokenizer.from_pretrained(where.get(name, lambda: shared(f"tokenizers/{name}"))())
    size = max(tokenizer.get_vocab().values()) + 1
    config = LlamaConfig(**{**SMALL, "vocab_size": size, "hidden_size": 32, "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    lines = shared("data/gsm8k_test.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:150]]
    pairs = json.loads(shared("data/lf_dpo_en_demo.json").read_text(encoding="utf-8"))[:50]
    texts = [row["question"] + row["answer"] for row in rows] + [json.dumps(row, ensure_ascii=False) for row in pairs]
    texts += [*HARD_TEXTS, *random_texts(1000)]
    source = Source.open(tmp_path / "model")
    first = vocabularies_of(tokenizer, size, [tokenizer.eos_token_id or 0])[0]
    write_gguf(source, first, "Q8_0", tmp_path / "tokens.gguf", {})
    with LlamaCpp(tmp_path / "tokens.gguf", 64) as llama:
        differ = [
            text for text in texts if llama.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]
        ]
    # llama.cpp normalises nothing; the Qwen tokenizer composes marks first.
    assert [text for text in differ if unicodedata.is_normalized("NFC", text)] == []
    assert name == "qwen2-151k" or differ == []
