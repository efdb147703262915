"""Greedy chat in the terminal, with memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from transformers import PreTrainedTokenizerBase

from packhorse.errors import UserError
from packhorse.evaluate.generate import Message, prompt_ids, stop_tokens, stream
from packhorse.evaluate.models import Model

PROMPT: Final = "> "
HELP: Final = "/reset starts a new chat, /exit ends it. Ctrl-C cuts an answer short."
UNFINISHED: Final = "\ufffd"


class ChatSession:
    """Chat with a model.

    Attributes:
        history: Messages so far.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 512) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_tokens(model, tokenizer)
        self.history: list[Message] = []

    def reset(self) -> None:
        """Forget the history."""
        self.history = []

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; add question and answer, even a cut one, to the history.

        Args:
            text: Message of the user.

        Raises:
            UserError: The chat fills the model's context.
        """
        question = {"role": "user", "content": text}
        prompt = prompt_ids(self._tokenizer, [*self.history, question])
        limit = min(self._max_new_tokens, self._free_tokens(len(prompt)))
        pieces: list[str] = []
        try:
            for piece in _readable(self._tokenizer, stream(self._model, prompt, limit, self._stop_ids)):
                pieces.append(piece)
                yield piece
        finally:
            self.history += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _free_tokens(self, num_tokens: int) -> int:
        context = int(self._model.config.get_text_config().max_position_embeddings)
        if num_tokens >= context:
            raise UserError(
                f"the chat has {num_tokens} tokens, and the model's context has {context}.",
                "a model cannot read beyond its context.",
                "type /reset for a new chat, or write a shorter message.",
            )
        return context - num_tokens


def chat(session: ChatSession, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Run a chat until /exit or the end of the input.

    Args:
        session: Chat with a model.
        read: Function like `input`: shows a prompt, returns a line, raises EOFError at the end.
        write: Function that takes text, including line ends.
    """
    write(HELP + "\n")
    while True:
        try:
            line = read(PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/exit":
            return
        if line == "/reset":
            session.reset()
            write("(new chat)\n")
        elif line.startswith("/"):
            write(f"there is no command {line}. {HELP}\n")
        elif line:
            _answer(session.reply(line), write)


def _answer(pieces: Iterable[str], write: Callable[[str], None]) -> None:
    try:
        for piece in pieces:
            write(piece)
        write("\n")
    except KeyboardInterrupt:
        write(" (cut short)\n")
    except UserError as error:
        write(f"{error}\n")


def _readable(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Yield each piece of text once it is complete: one character may need several tokens."""
    so_far: list[int] = []
    shown = ""
    text = ""
    for token in tokens:
        so_far.append(token)
        text = tokenizer.decode(so_far, skip_special_tokens=True)
        if len(text) > len(shown) and not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]
