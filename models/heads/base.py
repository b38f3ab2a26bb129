"""What the segmentation heads share: how they are built, what they return, and the loss by pixel."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = 255  # a mask's value for pixels that count nowhere


class Head(nn.Module):
    """From a backbone's patch features to a class for each pixel.

    A head is built as `Head(width, num_classes, **kwargs)`, whose keywords are its architecture, and called with the
    patch features of the backbone's last `reads` blocks, first block first, each [B, D, h, w] after the last norm. What
    it returns is its own business: `logits` and `loss` take it.
    """

    reads: int = 1  # how many of the last blocks

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """`reads` times [B, D, h, w] -> [B, C, h', w']."""
        raise NotImplementedError

    def logits(self, out: Tensor, size: tuple[int, int]) -> Tensor:
        """What `forward` gave -> class logits [B, C, *size] in fp32; their softmax is the probability of each class."""
        return F.interpolate(out.float(), size, mode="bilinear")

    def loss(self, out: Tensor, mask_BHW: Tensor) -> dict[str, Tensor]:
        """What `forward` gave, and the truth (uint8, IGNORE where there is none) -> {"loss": [B], **parts}.

        Cross-entropy over an image's labelled pixels, divided by all its pixels, so that a labelled pixel weighs the
        same in every image, on any number of ranks.
        """
        logits = self.logits(out, mask_BHW.shape[-2:])
        return {"loss": F.cross_entropy(logits, mask_BHW.long(), ignore_index=IGNORE, reduction="none").mean((1, 2))}
