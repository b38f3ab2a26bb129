"""Mask2Former, arXiv 2112.01527, on the simple feature pyramid of a plain backbone.

Its pixel decoder, transformer decoder, matcher and loss are those of Hugging Face transformers, built from its config:
nothing is downloaded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from .base import IGNORE, Head
from .pyramid import SCALES, SimplePyramid

try:
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerLoss,
        Mask2FormerPixelDecoder,
        Mask2FormerPreTrainedModel,
        Mask2FormerTransformerModule,
    )
except ImportError as error:
    need = f"segmentation.head mask2former: needs transformers ({error}); pip install transformers"
    raise ValueError(need) from error

# Logits of each decoder layer: classes [B, Q, C + 1], the last for none, and masks [B, Q, 4 h, 4 w].
Predictions = list[tuple[Tensor, Tensor]]


class Mask2Former(Head):
    """Queries, each with a class and a mask; a pixel's score for a class is the sum over queries of both."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        channels: int = 256,
        queries: int = 100,
        layers: int = 9,
        pixel_layers: int = 6,
        points: int = 12544,
    ) -> None:
        """The defaults are the paper's.

        Args:
            channels: width of all maps and queries, a multiple of 32.
            queries: Q.
            layers, pixel_layers: of the transformer decoder and the pixel decoder, at most 100.
            points: pixels of each mask that the loss samples.
        """
        super().__init__()
        if channels % 32 or not 1 <= layers <= 100 or not 1 <= pixel_layers <= 100:
            raise ValueError("channels must be a multiple of 32, layers and pixel_layers in 1..100")
        config = Mask2FormerConfig(
            feature_size=channels, mask_feature_size=channels, hidden_dim=channels, num_queries=queries,
            encoder_layers=pixel_layers, encoder_feedforward_dim=4 * channels, num_attention_heads=8,
            decoder_layers=layers + 1, dim_feedforward=8 * channels, train_num_points=points,
            num_labels=num_classes,
        )  # fmt: skip
        self.pyramid = SimplePyramid(width, channels)
        self.decoders = _Decoders(config)
        self.weights = {
            "loss_cross_entropy": config.class_weight, "loss_mask": config.mask_weight, "loss_dice": config.dice_weight,
        }  # fmt: skip
        # Beside the module tree: its class weights are no part of the model, and stay in fp32.
        object.__setattr__(self, "criterion", Mask2FormerLoss(config, self.weights))

    def forward(self, features: Sequence[Tensor]) -> Predictions:
        """[[B, D, h, w]] -> what the queries and each decoder layer predict, the last one last."""
        if _shapes_alone(features[-1]):  # in training transformers looks at the values, to keep them finite
            self.decoders.eval()
        return self.decoders(self.pyramid(features[-1]))

    def logits(self, out: Predictions, size: tuple[int, int]) -> Tensor:
        """Logarithms of the scores, [B, C, *size]: their softmax is each class's share of a pixel's scores."""
        classes, masks = out[-1]
        chance = F.interpolate(masks.float(), size, mode="bilinear").sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", classes.float().softmax(-1)[..., :-1], chance)
        return scores.clamp_min(1e-8).log()

    def loss(self, out: Predictions, mask_BHW: Tensor) -> dict[str, Tensor]:
        """The paper's, over the micro-batch: {"loss": [B], "class", "mask", "dice"}, the last three of the last layer.

        Each class that an image has is one target; pixels without a label are in none of its masks. Of each mask the
        loss samples points, from torch's generator.
        """
        if _shapes_alone(mask_BHW):  # nothing to match
            return {"loss": sum(part.float().mean((1, 2, 3)) for _, part in out)}
        classes = [of.unique() for of in mask_BHW]
        classes = [of[of != IGNORE].long() for of in classes]
        masks = [(mask == of[:, None, None]).float() for mask, of in zip(mask_BHW, classes, strict=True)]
        layers = [{"class_queries_logits": c.float(), "masks_queries_logits": m.float()} for c, m in out]
        targets = {"mask_labels": masks, "class_labels": classes}
        criterion, last = self.criterion.to(mask_BHW.device), layers.pop()
        parts = criterion(**last, **targets, auxiliary_predictions=layers)
        weighted = {
            name: value * next(weight for key, weight in self.weights.items() if name.startswith(key))
            for name, value in parts.items()
        }
        said = {"loss": sum(weighted.values()), "class": weighted["loss_cross_entropy"]}
        said |= {"mask": weighted["loss_mask"], "dice": weighted["loss_dice"]}
        return {name: value.expand(len(mask_BHW)) for name, value in said.items()}


def _shapes_alone(x: Tensor) -> bool:
    """Whether memory and FLOPs are counted, on tensors without values."""
    return x.is_meta or isinstance(x, FakeTensor)


class _Decoders(Mask2FormerPreTrainedModel):
    """Pixel decoder and transformer decoder with the classifier of the queries, initialised as transformers does it."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.pixels = Mask2FormerPixelDecoder(config, feature_channels=[config.feature_size] * len(SCALES))
        self.queries = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.classify = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, maps: list[Tensor]) -> Predictions:
        pixels = self.pixels(maps)
        out = self.queries(pixels.multi_scale_features, pixels.mask_features, output_hidden_states=True)
        states = out.intermediate_hidden_states
        return [(self.classify(h.transpose(0, 1)), m) for h, m in zip(states, out.masks_queries_logits, strict=True)]
