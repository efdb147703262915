"""Rows that a tiny model can learn by heart, in two languages."""

from packhorse.evaluate.compare import _reply
from packhorse.evaluate.measure import expected_of
from packhorse.evaluate.metrics.text import EXACT

FRUITS = ("apple", "pear", "plum", "fig", "kiwi", "lime", "date", "melon")
FRUTAS = ("manzana", "pera", "ciruela", "higo", "kiwi", "lima", "dátil", "melón")


def chat_of(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = [
    *({"messages": chat_of(f"say {x}", f"{x}!"), "fields": {"language": "en"}, "where": f"f:{x}"} for x in FRUITS),
    *({"messages": chat_of(f"di {x}", f"¡{x}!"), "fields": {"language": "es"}, "where": f"f:{x}"} for x in FRUTAS),
]


def is_right(question, answer):
    """Whether a comparison counts the answer as an exact match."""
    return EXACT.score(expected_of(question), _reply(answer)) == 1
