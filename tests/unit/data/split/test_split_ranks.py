"""The order that decides who is tested: pinned, so that no version of Packhorse moves a row from test to training."""

from __future__ import annotations

import numpy as np
import pytest

from packhorse.data.split.split import mix, ranks

GOLDEN_GAMMA = 0x9E3779B97F4A7C15


@pytest.mark.parametrize(
    ("state", "outputs"),
    [
        # Vigna's splitmix64.c from state 0, and the task "Pseudo-random numbers/Splitmix64" of Rosetta Code.
        pytest.param(0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], id="0"),
        pytest.param(
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
            id="1234567",
        ),
    ],
)
def test_mix_is_splitmix64(state: int, outputs: list[int]) -> None:
    states = [(state + number * GOLDEN_GAMMA) % 2**64 for number in range(len(outputs))]
    assert mix(np.array(states, np.uint64)).tolist() == outputs


def splitmix(state: int) -> int:
    """In whole numbers of Python, from the published C."""
    z = (state + GOLDEN_GAMMA) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 42, -1, 2**70 + 3])
def test_a_rank_is_a_hash_of_seed_and_both_halves_of_the_key(seed: int) -> None:
    keys = np.random.default_rng(1).integers(0, 2**64, (50, 2), np.uint64)
    start = splitmix(splitmix(seed % 2**64))
    assert ranks(keys, seed).tolist() == [splitmix(splitmix(low ^ start) ^ high) for high, low in keys.tolist()]


def test_another_purpose_is_another_order() -> None:
    keys = np.random.default_rng(1).integers(0, 2**64, (20000, 2), np.uint64)
    one, other = (ranks(keys, 42, purpose) / 2**64 for purpose in (0, 1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(one.mean() - 0.5) < 0.01
