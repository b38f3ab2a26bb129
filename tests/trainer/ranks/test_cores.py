"""A rank's share of the cores, however its launcher binds it."""

import pytest

from trainer.ranks.cores import share

ALL = range(64)


@pytest.mark.parametrize(
    ("places", "shares"),
    [
        ([("a", ALL)], [64]),
        ([("a", ALL)] * 8, [8] * 8),  # deepspeed, torchrun: none is bound
        ([("a", range(8 * i, 8 * i + 8)) for i in range(8)], [8] * 8),  # srun binds each to cores of its own
        ([("a", range(32))] * 4 + [("a", range(32, 64))] * 2, [8] * 4 + [16] * 2),  # to a socket
        ([("a", ALL), ("a", ALL), ("b", ALL)], [32, 32, 64]),  # two nodes
        ([("a", range(2))] * 8, [1] * 8),
        ([("a", range(6))] * 3, [2] * 3),
    ],
)
def test_cores_are_shared(places: list, shares: list[int]) -> None:
    assert [share(place, places) for place in places] == shares
