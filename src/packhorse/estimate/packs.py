"""What the packs of a run hold, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackFigures:
    """The packs of one split.

    Attributes:
        length_tokens: T, which no pack exceeds.
        num_packs: How many there are; None before the data is prepared.
        tokens_mean: Tokens of a pack.
        tokens_max: Of the fullest pack.
        supervised_mean: Supervised tokens of a pack: the positions at which the output head runs.
        supervised_max: Of the pack with most.
        squares_mean: Sum of squared document lengths of a pack, in tokens²: what attention costs.
        squares_max: Of the costliest pack.
        longest_document: In tokens; where it is not known, an upper bound.
    """

    length_tokens: int
    num_packs: int | None
    tokens_mean: float
    tokens_max: int
    supervised_mean: float
    supervised_max: int
    squares_mean: float
    squares_max: int
    longest_document: int

    @property
    def is_measured(self) -> bool:
        """Whether these are packs on disk; else the worst that `length_tokens` allows."""
        return self.num_packs is not None

    @classmethod
    def full(cls, length_tokens: int) -> PackFigures:
        """The worst case, before the data is prepared: each pack is one document of T tokens, all supervised."""
        # The first token of a document is predicted by none.
        labels = max(1, length_tokens - 1)
        return cls(
            length_tokens=length_tokens,
            num_packs=None,
            tokens_mean=float(length_tokens),
            tokens_max=length_tokens,
            supervised_mean=float(labels),
            supervised_max=labels,
            squares_mean=float(length_tokens**2),
            squares_max=length_tokens**2,
            longest_document=length_tokens,
        )

    @classmethod
    def of_store(
        cls, length_tokens: int, pack_figures: NDArray[np.int64], document_offsets: NDArray[np.int64] | None = None
    ) -> PackFigures:
        """Those of a prepared split.

        Args:
            length_tokens: T.
            pack_figures: int64 [3, P] of the pack store: tokens, supervised tokens, sum of squared document lengths.
            document_offsets: int64 [D + 1] of the pack store; absent, the longest document is bounded by the figures.

        Raises:
            ValueError: There is no pack.
        """
        tokens, labels, squares = (np.asarray(figure) for figure in pack_figures)
        if not len(tokens):
            raise ValueError("a split without packs has no figures")
        longest: Any = np.diff(document_offsets).max() if document_offsets is not None else None
        return cls(
            length_tokens=length_tokens,
            num_packs=len(tokens),
            tokens_mean=float(tokens.mean()),
            tokens_max=int(tokens.max()),
            supervised_mean=float(labels.mean()),
            supervised_max=int(labels.max()),
            squares_mean=float(squares.mean()),
            squares_max=int(squares.max()),
            # No document of a pack is longer than the root of the pack's sum of squares.
            longest_document=int(longest) if longest is not None else int(np.sqrt(squares.max())),
        )
