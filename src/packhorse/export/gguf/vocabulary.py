"""A tokenizer in GGUF form, from its tokenizer.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from packhorse.errors import UserError

GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Names by which llama.cpp knows how to cut a text before merges, by the regular expression in tokenizer.json.
PRE_TOKENIZERS: Final = {
    GPT2: "gpt-2",
    f"{_WORDS}{_REST}": "qwen2",
    f"{_WORDS}{{1,3}}{_REST}": "llama-bpe",
}
# Tried for any other expression: the proof on the run's own rows decides.
CANDIDATES: Final = ("gpt-2", "qwen2", "llama-bpe", "starcoder", "smollm", "gpt-4o", "tekken")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp reads it.

    Attributes:
        model: `gpt2` for byte-level merges, `llama` for merges of characters with bytes as a last resort.
        pre_tokenizer: llama.cpp's name of the rule that cuts a text before merges.
        tokens: Text of each id, filled up to the rows of the embeddings.
        types: Type of each id.
        merges: Merges in order, for `gpt2`.
        scores: Score of each id, for `llama`; llama.cpp joins the pair of the highest score first.
        space_first: Whether a space is put before a text, for `llama`.
        special: Ids by name: bos, eos, eot, unk, pad.
        chat_template: Jinja template, None where the tokenizer has none.
    """

    model: Literal["gpt2", "llama"]
    pre_tokenizer: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    space_first: bool
    special: dict[str, int]
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Write it into a file that is being made."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        # The template writes these tokens where training had them; else llama.cpp would put them a second time.
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabularies_of(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, stops: list[int]) -> list[Vocabulary]:
    """Return the tokenizer in GGUF form: more than one where only a proof can decide how texts are cut.

    Args:
        tokenizer: Fast tokenizer with the template that was trained.
        num_embeddings: Rows of the model's embeddings.
        stops: Ids that end an answer; the first is written as the end of a text, the second as the end of a turn.

    Raises:
        UserError: llama.cpp has no such kind of tokenizer, or it has more tokens than the model.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    model = fields["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"the tokenizer is of the type {model['type']}.",
            "a GGUF file is written for BPE tokenizers only; others would need scores that tokenizer.json lacks.",
            "export a Hugging Face folder: packhorse export RUN.",
        )
    tokens, types = _tokens(fields, num_embeddings)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    kind: Literal["gpt2", "llama"] = "llama" if _is_character_level(fields) else "gpt2"
    names = ("default",) if kind == "llama" else _pre_tokenizers(fields)
    return [
        Vocabulary(
            model=kind,
            pre_tokenizer=name,
            tokens=tokens,
            types=types,
            merges=tuple(merges),
            scores=_scores(tokens, merges) if kind == "llama" else (),
            space_first=_puts_space_first(fields),
            special=_special(tokenizer, stops),
            chat_template=_template(tokenizer),
        )
        for name in names
    ]


def _is_character_level(fields: dict[str, Any]) -> bool:
    """Return whether merges are of characters with `<0xXX>` tokens for the rest (SentencePiece's form of BPE)."""
    return bool(fields["model"].get("byte_fallback"))


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a sequence of normalisers or pre-tokenizers."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [*step.get("normalizers", ()), *step.get("pretokenizers", ())]
    return [step]


def _pre_tokenizers(fields: dict[str, Any]) -> tuple[str, ...]:
    parts = _parts(fields["pre_tokenizer"])
    expressions = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    if not expressions and [part["type"] for part in parts] == ["ByteLevel"] and parts[0]["use_regex"]:
        expressions = [GPT2]
    known = PRE_TOKENIZERS.get(expressions[0] or "") if len(expressions) == 1 else None
    return CANDIDATES if known is None else (known,)


def _puts_space_first(fields: dict[str, Any]) -> bool:
    steps = [*_parts(fields["normalizer"]), *_parts(fields["pre_tokenizer"])]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _tokens(fields: dict[str, Any], num_embeddings: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Return text and type of each id; ids of embeddings without a token are unused."""
    added = {token["id"]: token for token in fields["added_tokens"]}
    by_id = {index: text for text, index in fields["model"]["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    if max(by_id) >= num_embeddings:
        raise UserError(
            f"the tokenizer has {max(by_id) + 1} tokens, and the model has {num_embeddings} embeddings.",
            "llama.cpp refuses a file whose tokens and embeddings differ.",
            "train with model.new_tokens, which enlarges the embeddings, or name the base's tokenizer.",
        )
    unknown = fields["model"].get("unk_token")
    bytes_too = _is_character_level(fields)

    def type_of(index: int, text: str) -> TokenType:
        if index in added:
            special = TokenType.UNKNOWN if text == unknown and bytes_too else TokenType.CONTROL
            return special if added[index]["special"] else TokenType.USER_DEFINED
        if bytes_too and len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">"):
            return TokenType.BYTE
        return TokenType.NORMAL

    texts = [by_id.get(index, f"[PAD{index}]") for index in range(num_embeddings)]
    types = [type_of(index, text) if index in by_id else TokenType.UNUSED for index, text in enumerate(texts)]
    return tuple(texts), tuple(types)


def _scores(tokens: tuple[str, ...], merges: list[str]) -> tuple[float, ...]:
    """Return minus the rank of the first merge that makes each token: llama.cpp joins by score, not by rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return tuple(float(-ranks.get(token, len(merges))) for token in tokens)


def _special(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": stops[0],
        "eot": stops[1] if len(stops) > 1 else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in found.items() if index is not None}


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
