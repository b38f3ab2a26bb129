"""The order of an epoch, as a pure function of (seed, epoch)."""

import numpy as np


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled order of an epoch.

    Args:
        num_samples: samples in the file.
        seed: the run's seed, >= 0.
        epoch: 0, 1, 2, ...

    Returns:
        int64 [num_samples], a permutation of 0..num_samples-1. The same arguments give the same order on every machine.
    """
    # Philox is counter-based: its stream is fixed by the key alone and does not depend on the platform.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(num_samples).astype(np.int64)
