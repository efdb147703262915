"""Sizes of a run's packs, as far as memory and time depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackFigures:
    """Sizes of the packs of one split.

    Attributes:
        length_tokens: T, which no pack exceeds.
        num_packs: Number of packs; None before the data is prepared.
        tokens_mean: Mean tokens per pack.
        tokens_max: Tokens of the pack that has most.
        supervised_mean: Mean supervised tokens per pack: the positions at which the output head runs.
        supervised_max: Supervised tokens of the pack that has most.
        squares_mean: Mean sum of squared document lengths of a pack, in tokens², which attention's cost depends on.
        squares_max: Largest such sum.
        longest_document: Length in tokens of the longest document, or an upper bound.
        documents_max: Documents of the pack that has most.
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
    documents_max: int = 1

    @property
    def is_measured(self) -> bool:
        """Whether these are packs on disk; otherwise the worst case that `length_tokens` allows."""
        return self.num_packs is not None

    @classmethod
    def full(cls, length_tokens: int) -> PackFigures:
        """Return the worst case, before the data is prepared: each pack is one document of T supervised tokens."""
        # The first token of a document has no prediction.
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
        cls,
        length_tokens: int,
        pack_figures: NDArray[np.int64],
        document_offsets: NDArray[np.int64] | None = None,
        pack_offsets: NDArray[np.int64] | None = None,
    ) -> PackFigures:
        """Return the sizes of a prepared split.

        Args:
            length_tokens: T.
            pack_figures: int64 [3, P] of the pack store: tokens, supervised tokens, sum of squared document lengths.
            document_offsets: int64 [D + 1] of the pack store; None bounds the longest document by the figures.
            pack_offsets: int64 [P + 1] of the pack store, documents in front of each pack; None counts one in each.

        Raises:
            ValueError: The split has no pack.
        """
        tokens, labels, squares = (np.asarray(figure) for figure in pack_figures)
        if not len(tokens):
            raise ValueError("a split without packs has no figures")
        documents: Any = np.diff(pack_offsets).max() if pack_offsets is not None else 1
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
            documents_max=int(documents),
        )
