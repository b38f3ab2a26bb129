"""A backbone with a segmentation head: images of any size -> class logits of each pixel."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import take_any_size
from .heads import IGNORE, Head
from .taps import taps


class Segmenter(nn.Module):
    """`backbone`, a timm ViT without its classifier, and `head`.

    The backbone takes images of any size: its position embeddings are resized as timm does it. Called as a module it
    gives its tokens after the last norm [B, N, D].
    """

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        """Takes over `backbone`, and removes its classifier with all that pools for it.

        Raises:
            ValueError: the head reads more blocks than there are.
        """
        super().__init__()
        depth = len(backbone.blocks)
        if not 1 <= head.reads <= depth:
            raise ValueError(f"segmentation.kwargs: the head reads {head.reads} blocks, the model has {depth}")
        backbone.reset_classifier(0, "")
        backbone.fc_norm = nn.Identity()
        take_any_size(backbone)
        self.backbone, self.head = backbone, head
        self.earlier = tuple(f"blocks.{i}.rc2" for i in range(depth - head.reads, depth - 1))

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Class logits [B, C, H, W] in fp32 of images [B, 3, H, W]; with their masks [B, H, W] the head's loss instead.

        What does not fill the last patches is padded with zeros, the mean colour, and cut off again.
        """
        height, width = image.shape[-2:]
        rows, columns = self.backbone.patch_embed.patch_size
        padding = (0, -width % columns, 0, -height % rows)
        image = F.pad(image, padding)
        out = self.head(self.features(image))
        if mask is not None:
            return self.head.loss(out, F.pad(mask, padding, value=IGNORE))
        return self.head.logits(out, image.shape[-2:])[..., :height, :width]

    def features(self, image: Tensor) -> list[Tensor]:
        """Patch features of the last blocks that the head reads, after the last norm, first block first: [B, D, h, w].

        Sides of the images are multiples of the patch size.
        """
        with taps(self.backbone, self.earlier) as read:
            last = self.backbone(image)
        tokens = [*(self.backbone.norm(read[name]) for name in self.earlier), last]
        rows, columns = self.backbone.patch_embed.patch_size
        grid = (image.shape[-2] // rows, image.shape[-1] // columns)
        prefix = self.backbone.num_prefix_tokens
        return [x[:, prefix:].transpose(1, 2).unflatten(2, grid).contiguous() for x in tokens]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, as timm's models tell them."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, as timm's models tell them; the head, which none names, is the last."""
        groups = self.backbone.group_matcher(coarse)

        def inside(pattern: str) -> str:
            return rf"^backbone\.(?:{pattern.replace('^', '')})"

        blocks = [(inside(pattern), order) for pattern, order in groups["blocks"]]
        return {"stem": inside(groups["stem"]), "blocks": blocks}


def backbone_of(model: nn.Module) -> nn.Module:
    """The timm ViT itself, of what `load` gives."""
    return model.backbone if isinstance(model, Segmenter) else model
