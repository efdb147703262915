"""Template to token ids and mask, in batches, with the proofs that the right tokens are trained on.

Ids and masks equal `apply_chat_template(…, return_assistant_tokens_mask=True)`; here the text of a batch is
rendered once and tokenised in one call, and the spans of turns stay known, so that each turn can be proven.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from packhorse.data.formats.rows import Example, Message
from packhorse.data.places import NAMED_TEMPLATES, template_path
from packhorse.data.reading.mistakes import RowMistakes
from packhorse.errors import Mistake, UserError

BATCH_ROWS: Final = 1000
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
HOW_TO_MARK: Final = """put the markers around what the assistant says and its stop token:
  before: {{ message['content'] + eos_token }}
  after:  {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"""
PROBE: Final = (
    Message("user", "first question of the probe"),
    Message("assistant", "first answer of the probe"),
    Message("user", "second question of the probe"),
    Message("assistant", "second answer of the probe"),
)
PROBE_SYSTEM: Final = Message("system", "instruction of the probe")

Span = tuple[int, int]
Drawn = tuple[str, list[Span]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as tokens: ids [length], supervised uint8 [length], 1 where the token is trained on."""

    ids: list[int]
    supervised: NDArray[np.uint8]


@dataclass(frozen=True)
class Renderer:
    """A tokenizer that has been proven, and what is known of it.

    Attributes:
        tokenizer: The fast tokenizer, with the template set.
        stop_ids: Tokens at which generation stops.
        vocab_size: Highest id + 1.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    vocab_size: int


def load_tokenizer(folder: Path, template: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer and set the template that rows are trained with; so it is saved with the model.

    Args:
        folder: Local folder in Hugging Face form.
        template: `data.template` of the recipe.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        UserError: The folder holds no usable tokenizer, or the named template needs tokens that it lacks.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises exactly this type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded: {reason}",
            "rows become token ids with it.",
            "set model.tokenizer to a folder with tokenizer.json and tokenizer_config.json.",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} is a slow one ({type(tokenizer).__name__}).",
            "only a fast one knows which characters a token stands for, which the mask needs.",
            "convert it to tokenizer.json (tokenizers library) and name that folder in model.tokenizer.",
        )
    path = template_path(template)
    if path is not None:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if template in NAMED_TEMPLATES:
        _set_stop_token(tokenizer, template, folder)
    return tokenizer


def make_renderer(tokenizer: PreTrainedTokenizerBase, folder: Path, chats: bool) -> Renderer:
    """Prove that the tokenizer's template trains what it should, on a chat made for it.

    Args:
        tokenizer: From `load_tokenizer`.
        folder: Where it was loaded from; its generation_config.json may name more stop tokens.
        chats: Whether there are chats among the rows; plain text needs no template.

    Raises:
        UserError: No template, no generation markers, user text or not each answer in them, or no stop token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no eos_token.",
            "without a stop token a model never learns to stop.",
            "set eos_token in its tokenizer_config.json.",
        )
    stops = _stop_ids(tokenizer, folder)
    # The vocabulary may have gaps, so its size can be below its highest id.
    renderer = Renderer(tokenizer, stops, max(tokenizer.get_vocab().values()) + 1)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if chats:
        _check_markers(tokenizer, folder)
        _check_probe(renderer)
    return renderer


def render_examples(renderer: Renderer, examples: Sequence[Example], mistakes: RowMistakes) -> list[Rendered | None]:
    """Render up to a batch of rows; None in the place of a row that cannot be trained on as it is.

    Text is tokenised as the tokenizer does by itself, and ends with the stop token; all of it is trained on.
    """
    out: list[Rendered | None] = [None] * len(examples)
    chats = [at for at, row in enumerate(examples) if row.messages is not None]
    texts = [(at, row.text) for at, row in enumerate(examples) if row.text is not None]
    for at, rendered in zip((at for at, _ in texts), _render_texts(renderer, [text for _, text in texts])):
        out[at] = rendered
    drawn = zip(chats, _draw(renderer, [examples[at] for at in chats], mistakes))
    good = [(at, *chat) for at, chat in drawn if chat and _spans_fit(examples[at], chat[1], mistakes)]
    backend = renderer.tokenizer.backend_tokenizer
    encodings = backend.encode_batch([text for _, text, _ in good], add_special_tokens=False)
    for (at, text, spans), encoding in zip(good, encodings):
        out[at] = _mask(renderer, examples[at], text, spans, encoding, mistakes)
    return [row and _without_double_start(renderer, row, example, mistakes) for row, example in zip(out, examples)]


def _set_stop_token(tokenizer: PreTrainedTokenizerBase, template: str, folder: Path) -> None:
    marks = NAMED_TEMPLATES[template]
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in marks if token not in vocabulary]
    if missing:
        raise UserError(
            f"data.template is {template}, and the tokenizer in {folder} has no token {' and no '.join(missing)}.",
            "split into letters, the marks would not tell turns apart, and nothing would end an answer.",
            "write a Jinja file with marks that this tokenizer has, or use a tokenizer that has these tokens.",
        )
    tokenizer.eos_token = marks[-1]


def _stop_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    stops = {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set(named) if isinstance(named, list) else {named} - {None}
    return frozenset(stops)


def _has_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    return set(NAMED_TEMPLATES["chatml"]) <= set(tokenizer.get_vocab())


def _check_markers(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if not tokenizer.chat_template:
        has_chatml = _has_chatml(tokenizer)
        own = f"set data.template to a Jinja file of your own; in it, {HOW_TO_MARK}"
        raise UserError(
            f"the tokenizer in {folder} has no chat template.",
            "the template turns messages into text and marks what is trained.",
            "set data.template: chatml, whose tokens this tokenizer has." if has_chatml else own,
        )
    if not GENERATION.search(tokenizer.get_chat_template()):
        has_chatml = _has_chatml(tokenizer)
        chatml = "\n  or set data.template: chatml, whose tokens this tokenizer has." if has_chatml else ""
        raise UserError(
            f"the chat template of {folder} has no {{% generation %}} markers.",
            "they mark what the assistant says; without them nothing, or the user's text too, would be trained on.",
            f"copy the template to a file, name the file in data.template, and in it {HOW_TO_MARK}{chatml}",
        )


def _check_probe(renderer: Renderer) -> None:
    """Render a chat whose every turn is known, with a system turn where the template takes one."""
    chats = [(PROBE_SYSTEM, *PROBE), PROBE]
    drawn = None
    for messages in chats:
        try:
            drawn = messages, *draw_chats(renderer.tokenizer, [messages])[0]
            break
        except TemplateError as error:
            reason = error
    if drawn is None:
        raise UserError(
            f"the chat template cannot render a chat of user and assistant turns: {reason}",
            "every row is rendered by it.",
            "mend the template, or set data.template to another.",
        )
    messages, text, spans = drawn
    for message in messages:
        start = text.find(message.content)
        end = start + len(message.content)
        touched = start >= 0 and any(start < stop and begin < end for begin, stop in spans)
        if message.role != "assistant" and touched:
            raise UserError(
                f"the chat template has the text of the {message.role} inside its generation markers.",
                "the model would learn to write the prompt.",
                "let the markers hold what the assistant says and its stop token, nothing else.",
            )
    _check_spans(renderer, messages, text, spans)


def _check_spans(renderer: Renderer, messages: Sequence[Message], text: str, spans: list[Span]) -> None:
    mistakes = RowMistakes("the chat template")
    example = Example(tuple(messages), None, {}, "")
    if _spans_fit(example, spans, mistakes):
        encoding = renderer.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        _mask(renderer, example, text, spans, encoding, mistakes)
    mistakes.raise_if_any()


def draw_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]]) -> list[Drawn]:
    """Return each chat's text and the character spans that the template marks as the assistant's.

    Raises:
        TemplateError: The template refuses a chat.
    """
    texts, spans = render_jinja_template(
        conversations=[[{"role": turn.role, "content": turn.content} for turn in chat] for chat in chats],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return list(zip(texts, spans))


def _draw(renderer: Renderer, examples: list[Example], mistakes: RowMistakes) -> list[Drawn | None]:
    chats = [example.messages or () for example in examples]
    if not chats:
        return []
    try:
        return [*draw_chats(renderer.tokenizer, chats)]
    except TemplateError:
        # One row was refused: again one by one, to name it.
        return [_draw_alone(renderer, example, mistakes) for example in examples]


def _draw_alone(renderer: Renderer, example: Example, mistakes: RowMistakes) -> Drawn | None:
    messages = example.messages or ()
    try:
        return draw_chats(renderer.tokenizer, [messages])[0]
    except TemplateError as error:
        mistakes.add(
            Mistake(
                f"the chat template refuses the chat (roles: {', '.join(turn.role for turn in messages)}): {error}",
                "every row is rendered by it.",
                "mend the row, or set data.template to one that takes it.",
                example.where,
            )
        )
        return None


def _spans_fit(example: Example, spans: list[Span], mistakes: RowMistakes) -> bool:
    answers = sum(message.role == "assistant" for message in example.messages or ())
    if answers == len(spans):
        return True
    mistakes.add(
        Mistake(
            f"the chat has {answers} assistant turns, and the template marks {len(spans)} as generated.",
            "a turn without its mark would not be learnt, and a mark without a turn trains something else.",
            "put {% generation %} and {% endgeneration %} around each assistant turn, once.",
            example.where,
        )
    )
    return False


def _mask(
    renderer: Renderer, example: Example, text: str, spans: list[Span], encoding: Encoding, mistakes: RowMistakes
) -> Rendered | None:
    ids = encoding.ids
    supervised = np.zeros(len(ids), np.uint8)
    answers = [message for message in example.messages or () if message.role == "assistant"]
    for number, (message, (start, end)) in enumerate(zip(answers, spans), 1):
        if not message.trained:
            continue
        first, last = _token_span(encoding, start, end)
        # Templates may end a turn with a line break after the stop token.
        _, stop = _token_span(encoding, start, start + len(text[start:end].rstrip()))
        if first is None or last is None or stop is None or ids[stop] not in renderer.stop_ids:
            mistakes.add(_no_stop(renderer, example, number, None if stop is None else ids[stop]))
            return None
        supervised[first : last + 1] = 1
    return Rendered(ids, supervised)


def _token_span(encoding: Encoding, start: int, end: int) -> tuple[int | None, int | None]:
    """Return the first and last token of a span; characters that no token stands for are passed over."""
    first = next((token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None), None)
    last = next(
        (token for at in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(at)) is not None), None
    )
    return first, last


def _no_stop(renderer: Renderer, example: Example, number: int, found: int | None) -> Mistake:
    tokenizer = renderer.tokenizer
    stops = " or ".join(tokenizer.convert_ids_to_tokens(sorted(renderer.stop_ids)))
    seen = "nothing" if found is None else tokenizer.convert_ids_to_tokens(found)
    return Mistake(
        f"assistant turn {number} is trained up to {seen}, and generation stops at {stops}.",
        "a model that is not taught its stop token never stops.",
        "end the generation block of the template with the stop token: "
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}.",
        example.where,
    )


def _render_texts(renderer: Renderer, texts: list[str]) -> list[Rendered]:
    stop = renderer.tokenizer.eos_token_id
    rows = [encoding.ids for encoding in renderer.tokenizer.backend_tokenizer.encode_batch(texts)]
    rows = [ids if ids[-1:] == [stop] else [*ids, stop] for ids in rows]
    return [Rendered(ids, np.ones(len(ids), np.uint8)) for ids in rows]


def _without_double_start(
    renderer: Renderer, row: Rendered, example: Example, mistakes: RowMistakes
) -> Rendered | None:
    start = renderer.tokenizer.bos_token_id
    if start is None or row.ids[:2] != [start, start]:
        return row
    mistakes.add(
        Mistake(
            f"the row begins with {renderer.tokenizer.bos_token} twice.",
            "the model never saw that; it is written by the template, the text or the tokenizer, and again by another.",
            "remove it from the template or from the row's text.",
            example.where,
        )
    )
    return None
