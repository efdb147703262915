"""Part `decoding`: greedy answers as `packhorse evaluate` makes them, with a model of one billion random weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from packhorse.evaluate.generate import greedy
from packhorse.model_spec.configuration import published
from runs import TINY, WORDS, model_of, peak_gib
from setting import Case, Figures, Setting

CONFIG = published()["meta-llama/Llama-3.2-1B"]
PROMPT_TOKENS, NEW_TOKENS = 256, 64


def cases(setting: Setting) -> Iterator[Case]:
    """Yield batches of some sizes; 64 is that of `packhorse evaluate`."""
    model = model_of(TINY if setting.smoke else CONFIG, setting)

    def figures(batch: int) -> Figures:
        prompt, new = (16, 4) if setting.smoke else (PROMPT_TOKENS, NEW_TOKENS)
        drawn = np.random.default_rng(0)
        # Prompts of different lengths, as in a data set: the shorter ones are padded.
        prompts = [drawn.integers(2, WORDS, prompt - at % 8).tolist() for at in range(batch)]
        seconds = setting.seconds(lambda: greedy(model, prompts, [new] * batch, frozenset()), 2, 1)
        return {"new tokens/s": batch * new / seconds, "ms a token": seconds / new * 1e3, "peak GiB": peak_gib(setting)}

    for batch in (2,) if setting.smoke else (64, 1, 256):
        yield f"batch of {batch}", lambda batch=batch: figures(batch)
