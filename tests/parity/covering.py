"""Covering arrays: few cells of a matrix in which each combination of a few settings stands at least once.

Greedy, as in AETG (Cohen et al. 1997, IEEE Trans. Software Eng. 23(7)): always the cell that adds most.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Cell = dict[str, str]
Combination = frozenset[tuple[str, str]]


def allowed_cells(factors: Mapping[str, Sequence[str]], allowed: Callable[[Cell], bool]) -> list[Cell]:
    """The whole matrix without the cells that cannot be."""
    cells = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [cell for cell in cells if allowed(cell)]


def combinations_of(cell: Cell, strength: int) -> frozenset[Combination]:
    """Each combination of `strength` settings that the cell has."""
    return frozenset(frozenset(chosen) for chosen in combinations(cell.items(), strength))


def covering_array(cells: Sequence[Cell], strength: int, beside: Sequence[Cell] = ()) -> list[Cell]:
    """Cells that hold, with those `beside` them, each combination of `strength` settings that any of `cells` holds.

    Equal arguments give an equal choice.
    """
    cells = random.Random(0).sample(cells, len(cells))  # or equal ones would all be those listed first
    of_cell = [combinations_of(cell, strength) for cell in cells]
    missing = set().union(*of_cell) - set().union(*(combinations_of(cell, strength) for cell in beside))
    # What a cell adds can only shrink, so an old figure is an upper bound: only the best is counted again.
    queue = [(-len(held), at) for at, held in enumerate(of_cell)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        _, at = heapq.heappop(queue)
        adds = len(of_cell[at] & missing)
        if queue and adds < -queue[0][0]:
            heapq.heappush(queue, (-adds, at))
            continue
        chosen.append(cells[at])
        missing -= of_cell[at]
    return chosen
