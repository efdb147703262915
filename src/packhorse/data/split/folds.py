"""K-fold cross-validation: divide the rows outside the test split into folds, and hold one of them out.

Shapes: R rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packhorse.data.split.shares import Shares
from packhorse.data.split.split import SIDE_NAMES, Int32, Sides, UInt64, assign
from packhorse.errors import UserError

TRAIN, VALIDATION, TEST = range(len(SIDE_NAMES))


def held_out_fold(
    keys: UInt64, groups: NDArray[np.integer], strata: Int32, sides: Sides, fold: tuple[int, int], seed: int
) -> None:
    """Make one fold the validation rows and the others the train rows; test rows stay sealed.

    The folds depend on the seed and the rows alone, so each row is in exactly one fold of all runs. Groups of rows stay
    together, and each stratum has equal shares in the folds, as `assign` divides them.

    Args:
        keys: uint64 [R, 2] hash of each row's content.
        groups: [R] label of the rows that stay together.
        strata: int32 [R] code of each row's stratum.
        sides: int8 [R], index into `SIDE_NAMES`; changed in place.
        fold: Number of the fold from 1, and number of folds.
        seed: Seed of the split.

    Raises:
        UserError: A fold has no rows, because too few rows may be on different sides.
    """
    number, num_folds = fold
    rows = np.flatnonzero(sides != TEST)
    folds = assign(keys[rows], groups[rows], strata[rows], [1 / num_folds] * num_folds, seed)
    num_groups = len(np.unique(groups[rows]))
    if len(np.unique(folds)) < num_folds:
        raise UserError(
            f"data.sources has {len(rows):,} rows outside test, in {num_groups:,} groups, for {num_folds} folds.",
            "copies and rows of one group are in one fold, and each fold needs rows to validate.",
            f"set sweep.folds to {min(num_folds - 1, num_groups)} or less, or add rows.",
        )
    sides[rows] = np.where(folds == number - 1, VALIDATION, TRAIN)


def fold_shares(shares: Shares, fold: tuple[int, int]) -> tuple[Shares, str]:
    """Return the shares of train, validation and test with one fold as validation, and the reason.

    Args:
        shares: Shares of the recipe, of which only that of test counts.
        fold: Number of the fold from 1, and number of folds.
    """
    number, num_folds = fold
    validation = (1 - shares[TEST]) / num_folds
    reason = f"validation is fold {number} of {num_folds} of the rows outside test, and train is the rest"
    return (1 - shares[TEST] - validation, validation, shares[TEST]), reason
