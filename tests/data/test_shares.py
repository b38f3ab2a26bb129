"""Shares: every sample counts once over all ranks, and all ranks take as many steps."""

import numpy as np
import pytest

from data.shares import BySize, InOrder, Shuffled

CHOSEN = np.arange(10, 47)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_sample_once(world_size):
    sizes = np.stack([np.arange(50) % 3 + 4, np.full(50, 5)], axis=1)
    for kind, more in ((InOrder, {}), (BySize, {"sizes": sizes})):
        ranks = [
            kind(chosen=CHOSEN, micro_batch_size=4, rank=r, world_size=world_size, **more) for r in range(world_size)
        ]
        shares = [rank.of(0, 0) for rank in ranks]
        assert {len(batches) for batches, _ in shares} == {ranks[0].steps}
        seen = np.concatenate([batch[valid] for share in shares for batch, valid in zip(*share, strict=True)])
        assert np.array_equal(np.sort(seen), CHOSEN)
        for rank, (batches, _) in zip(ranks, shares, strict=True):
            later, _ = rank.of(0, 2)
            assert all(np.array_equal(*pair) for pair in zip(later, batches[2:], strict=True))
            assert kind is InOrder or all(len(np.unique(sizes[batch], axis=0)) == 1 for batch in batches)


def test_global_batches_do_not_depend_on_ranks():
    def steps(world_size: int, accumulate: int) -> np.ndarray:
        how = {"micro_batch_size": 8 // (world_size * accumulate), "accumulate": accumulate, "seed": 3}
        ranks = [Shuffled(chosen=CHOSEN, rank=r, world_size=world_size, **how) for r in range(world_size)]
        parts = [np.concatenate(rank.of(1, 0)[0]).reshape(rank.steps, -1) for rank in ranks]
        return np.concatenate(parts, axis=1)

    alone = steps(1, 1)
    assert alone.shape == (4, 8) and len(np.unique(alone)) == 32 and set(alone.ravel()) <= set(CHOSEN)
    for world_size, accumulate in ((2, 1), (1, 4), (4, 2)):
        assert np.array_equal(steps(world_size, accumulate), alone)
