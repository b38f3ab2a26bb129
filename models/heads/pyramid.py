"""The simple feature pyramid of ViTDet, arXiv 2203.16527, section 3: from a plain backbone's last map, no other."""

from timm.layers import LayerNorm2d
from torch import Tensor, nn

SCALES = (4, 2, 1, 0.5)  # of the patch grid: strides 4, 8, 16, 32 for patches of 16 pixels


def conv(inside: int, outside: int, size: int, act: bool = True) -> nn.Sequential:
    """Convolution, layer norm over the channels and ReLU.

    Layer norm as in ViTDet, where segmentation heads have batch norm by custom: no statistics of a batch, so the same
    on any number of ranks and for any batch size.
    """
    layers = [nn.Conv2d(inside, outside, size, padding=size // 2, bias=False), LayerNorm2d(outside)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class SimplePyramid(nn.Module):
    """[B, D, h, w] -> four maps [B, channels, h s, w s] for s in `SCALES`, finest first."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.resize = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, half, 2, 2), LayerNorm2d(half), nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(width, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),
            ]
        )  # fmt: skip
        widths = (quarter, half, width, width)
        self.smooth = nn.ModuleList(
            nn.Sequential(conv(w, channels, 1, act=False), conv(channels, channels, 3, act=False)) for w in widths
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        return [smooth(resize(x)) for resize, smooth in zip(self.resize, self.smooth, strict=True)]
