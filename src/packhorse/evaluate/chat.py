"""A chat in the terminal, greedy, with memory of what was said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from transformers import PreTrainedTokenizerBase

from packhorse.errors import UserError
from packhorse.evaluate.generate import Message, prompt_ids, stop_tokens, stream
from packhorse.evaluate.models import Model

PROMPT: Final = "> "
HELP: Final = "/reset starts anew, /exit ends. Ctrl-C cuts an answer short."
UNFINISHED: Final = "\ufffd"


class ChatSession:
    """A chat with a model.

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
        """Forgets what was said."""
        self.history = []

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece; question and answer, cut short or not, enter the history.

        Args:
            text: What the user says.

        Raises:
            UserError: The chat is as long as the model's context.
        """
        question = {"role": "user", "content": text}
        prompt = prompt_ids(self._tokenizer, [*self.history, question])
        limit = min(self._max_new_tokens, self._room(len(prompt)))
        pieces: list[str] = []
        try:
            for piece in _readable(self._tokenizer, stream(self._model, prompt, limit, self._stop_ids)):
                pieces.append(piece)
                yield piece
        finally:
            self.history += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _room(self, num_tokens: int) -> int:
        context = int(self._model.config.get_text_config().max_position_embeddings)
        if num_tokens >= context:
            raise UserError(
                f"the chat has {num_tokens} tokens, the model's context {context}.",
                "a model cannot read beyond its context.",
                "type /reset to start anew, or ask something shorter.",
            )
        return context - num_tokens


def chat(session: ChatSession, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Runs a chat until /exit or the end of the input.

    Args:
        session: Who is talked to.
        read: Shows a prompt and returns a line, as `input` does; raises EOFError at the end.
        write: Takes text as it comes, with its line ends.
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
            write(f"{line} is no command. {HELP}\n")
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
    """Yields text as soon as it is whole: a letter may be spread over several tokens."""
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
