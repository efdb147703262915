"""What autograd keeps of a forward pass, counted without running it.

torch keeps a tensor once, however many operations need it, and keeps only what the backward pass will read:

    linear       its input where the weight is trained, its weight where the input has a gradient
    product      each factor that the other's gradient needs
    norm         the input in float32 and its inverse root mean square; the normed input where the weight is trained
    silu, gelu   their input
    attention    queries, keys, values, output, and the logarithm of each softmax's sum

Weights themselves are not counted, copies of them that autocast makes are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """A tensor of the forward pass.

    Attributes:
        key: Of its storage; values that are views of one another have the same.
        elements: Of the storage.
        width: Bytes of an element.
        has_grad: Whether the backward pass reaches it.
    """

    key: int
    elements: int
    width: int
    has_grad: bool

    @property
    def bytes(self) -> int:
        """Of the storage."""
        return self.elements * self.width


@dataclass
class Tape:
    """Adds up what is kept, by part of the model."""

    saved: dict[int, tuple[str, int]] = field(default_factory=dict)
    _next: int = 0

    def value(self, elements: int, width: int, has_grad: bool) -> Value:
        """A new tensor."""
        self._next += 1
        return Value(self._next, elements, width, has_grad)

    def keep(self, value: Value, part: str) -> None:
        """Keeps a tensor for the backward pass."""
        self.saved.setdefault(value.key, (part, value.bytes))

    def keep_new(self, elements: int, width: int, part: str) -> None:
        """Keeps a tensor that nothing else reads."""
        self.keep(self.value(elements, width, True), part)

    def cast(self, value: Value, width: int) -> Value:
        """The same numbers in another width; itself where it has that width already."""
        return value if value.width == width else self.value(value.elements, width, value.has_grad)

    def total(self, parts: Iterable[str] | None = None) -> int:
        """Bytes kept, of some parts or of all."""
        wanted = None if parts is None else set(parts)
        return sum(size for part, size in self.saved.values() if wanted is None or part in wanted)

    def by_part(self) -> dict[str, int]:
        """Bytes kept of each part."""
        parts: dict[str, int] = {}
        for part, size in self.saved.values():
            parts[part] = parts.get(part, 0) + size
        return parts
