"""How far a measured figure is to be trusted: 95 % intervals."""

import math

Z = 1.959964  # of a normal distribution, 95 % two-sided


def wilson(hits: int, images: int) -> tuple[float, float]:
    """95 % interval of an accuracy in percent (Wilson, JASA 22, 1927)."""
    share = hits / images
    centre = share + Z**2 / (2 * images)
    half = Z * math.sqrt(share * (1 - share) / images + (Z / (2 * images)) ** 2)
    return tuple(100 * (centre + sign * half) / (1 + Z**2 / images) for sign in (-1, 1))
