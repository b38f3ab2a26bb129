"""Mixup, cutmix and drop path as timm has them, each draw a pure function of the sample's key and a number.

timm draws from generators that know nothing of the sample, so what happens to it changes with the world size, the
accumulation and the place where a run resumed. Here it does not: `uniforms` continues the hash that drew its view.
"""

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

# Numbers of the draws; the views of data.augment use 0 to 40.
_SWITCH, _LAMBDA, _TOP, _LEFT = 64, 65, 66, 67
_DROP_PATH = 128  # and on, two per block


def uniforms(key_B: Tensor, draw: int | Tensor) -> Tensor:
    """Number `draw` of the samples' random numbers, float64 [B] in [0, 1): bit for bit those of `data.augment.uniform`.

    Args:
        key_B: int64, `key` of a batch.
        draw: a number, or an int64 tensor that broadcasts with the keys.
    """
    x = (key_B ^ draw) + _signed(0x9E3779B97F4A7C15)  # splitmix64's finaliser; int64 wraps as uint64 does
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The logical shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Mixup:
    """Mixup, arXiv 1710.09412, and cutmix, arXiv 1905.04899, with timm's distributions, a draw per pair of neighbours.

    Samples 2j and 2j + 1 of a batch are each other's partner. They are neighbours in the global batch too, so they meet
    at any world size and accumulation. The first one's key draws for both: mixup or cutmix (evenly, where both are on),
    lambda ~ Beta(alpha, alpha), and cutmix's box, by whose clipped area lambda is corrected.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        """The two alphas; 0 is off, for one of them."""
        assert mixup > 0 or cutmix > 0
        self.switch = 0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0)
        # Beta's quantiles on an even grid: torch has no inverse of its distribution function.
        grid = np.linspace(0, 1, 4097)
        tables = [betaincinv(alpha, alpha, grid) if alpha > 0 else grid for alpha in (mixup, cutmix)]
        self.quantiles = torch.from_numpy(np.stack(tables))

    def __call__(self, image: Tensor, key_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W], B even -> mixed images, each one's own share lambda [B] in fp32, its partner's place [B]."""
        self.quantiles = self.quantiles.to(image.device)
        height, width = image.shape[-2:]
        first = key_B[0::2].repeat_interleave(2)
        partner = torch.arange(len(image), device=image.device) ^ 1
        cut = uniforms(first, _SWITCH) < self.switch
        share = self._quantile(cut.long(), uniforms(first, _LAMBDA))
        rows, columns = _side(height, share, uniforms(first, _TOP)), _side(width, share, uniforms(first, _LEFT))
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        area = rows.sum(1) * columns.sum(1) / (height * width)
        own = torch.where(cut[:, None, None, None], (~inside).double(), share[:, None, None, None]).float()
        mixed = (image * own + image[partner] * (1 - own)).to(image.dtype)
        return mixed, torch.where(cut, 1 - area, share).float(), partner

    def _quantile(self, which: Tensor, at: Tensor) -> Tensor:
        place = at * (self.quantiles.shape[1] - 1)
        below = place.long()
        return torch.lerp(self.quantiles[which, below], self.quantiles[which, below + 1], place - below)


def _side(length: int, share: Tensor, at: Tensor) -> Tensor:
    """Which pixels of a side lie in a box that leaves `share` [B] of the area, centred `at` [B]: bool [B, length]."""
    cut, centre = (length * (1 - share).sqrt()).long(), (at * length).long()
    pixel = torch.arange(length, device=at.device)
    return (pixel >= (centre - cut // 2)[:, None]) & (pixel < (centre + (cut + 1) // 2)[:, None])


class DropPath(nn.Module):
    """Stochastic depth, arXiv 1603.09382, with timm's scaling: a sample's path is 0, or divided by the share kept.

    `scale` [B], set by `draw_paths` before each forward, stays for the recomputation of gradient checkpointing.
    """

    def __init__(self, rate: float) -> None:
        """`rate`: share of the paths that are dropped, at least 0 and below 1."""
        super().__init__()
        self.rate = rate
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]; in evaluation as it came."""
        if not self.training:
            return x
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def draw_paths(paths: dict[int, DropPath], key_B: Tensor) -> None:
    """Draw which samples keep which of the numbered paths."""
    if not paths:
        return
    numbers, rates = torch.tensor(list(paths)), torch.tensor([path.rate for path in paths.values()])
    draws, rates = (x.to(key_B.device, non_blocking=True)[:, None] for x in (numbers + _DROP_PATH, rates))
    keep = 1 - rates
    for path, scale in zip(paths.values(), (uniforms(key_B, draws) < keep) / keep, strict=True):
        path.scale = scale
