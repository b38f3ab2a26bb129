"""A converted model's linear layers, solved for in closed form on some images.

In each block the output projection of attention, then the last layer of the feed-forward network: they take the weights
that bring the student's residual stream, as the blocks before made it, nearest to the teacher's. That is the least
squares reconstruction of channel pruning (He et al., arXiv 1707.06168, section 3.1), which goes through a network layer
by layer and so makes good what the layers before did wrong.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .linearize import ViT, note_image_size, rotary_embeddings
from .parallel import PARALLEL, ParallelBlock, with_plain_blocks
from .taps import taps

RIDGE = 1e-3  # penalty on a change of the weights, in units of the inputs' mean variance
SILENT = 1e-3  # a channel whose layer scale is below this share of the mean one is left as it is


class Layer(NamedTuple):
    """A linear layer whose output joins the residual stream."""

    linear: nn.Linear
    gain: Tensor | None  # layer scale, [D]
    reads: str  # the tap of its inputs
    joins: str  # the tap at which the stream has its output


def layers(block: nn.Module) -> list[Layer]:
    """Those of a block, in the order of the forward pass; none where a norm comes between them and the stream."""
    if type(block) is ParallelBlock:
        gains, joins = [block.ls, block.ls], ("rc2", "rc2")
    elif type(block) is Block:
        gains, joins = [block.ls1, block.ls2], ("rc1", "rc2")
    elif type(block) is EvaBlock:
        gains, joins = [block.gamma_1, block.gamma_2], ("rc1", "rc2")
    else:
        return []
    gains = [getattr(gain, "gamma", None) if isinstance(gain, nn.Module) else gain for gain in gains]
    return list(map(Layer, (block.attn.proj, block.mlp.fc2), gains, ("heads", "fc2_in"), joins))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # what is read lies inside of compiled blocks
def refit(
    student: ViT,
    teacher: ViT,
    images: Sequence[Tensor],
    device: torch.device | str = "cpu",
    prefix_weight: float = 1.0,
    add_up: Callable[[Tensor], object] | None = None,
) -> int:
    """Solve for those layers of `student` that require gradients, in place. Returns how many these were.

    On `device` there is one block of each model at a time, with one batch: memory does not grow with the models' depth.

    Args:
        student: a copy of `teacher` with linear attention, trained or not; both on the CPU, in fp32.
        images: batches [B, 3, H, W], all of one size.
        prefix_weight: of a prefix token's error, where a patch token's has 1.
        add_up: adds a tensor up over processes, in place, where each has its own images.
    """
    if any(type(block) in PARALLEL for block in teacher.blocks):
        teacher = with_plain_blocks(copy.deepcopy(teacher))  # as the student's
    mine, theirs = walks = [Walk(vit, images, torch.device(device)) for vit in (student, teacher)]
    weights = torch.ones(mine.tokens[0].shape[1], device=device)
    weights[: student.num_prefix_tokens] = prefix_weight
    solved = 0
    with full_precision():
        for i, block in enumerate(student.blocks):
            for walk in walks:
                walk.enter(i)
            for layer in layers(block):
                if layer.linear.weight.requires_grad:
                    solve(layer, mine, theirs, weights, add_up)
                    solved += 1
            for walk in walks:
                walk.leave()
    return solved


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the context a GPU multiplies fp32 matrices in fp32: sums of products are ill conditioned."""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


class Walk:
    """A ViT, block after block: the tokens of all images wait on the CPU before one of them."""

    def __init__(self, vit: ViT, images: Sequence[Tensor], device: torch.device) -> None:
        self.vit, self.device = vit, device
        size = images[0].shape[-2:]
        note_image_size(vit, size)
        self.ropes = rotary_embeddings(vit, size)
        blocks, norm, self.training = vit.blocks, vit.norm, vit.training
        vit.eval()
        vit.blocks, vit.norm = nn.Sequential(), nn.Identity()
        try:
            self.tokens = [vit.forward_features(image.cpu()) for image in images]  # [B, N, D]
        finally:
            vit.blocks, vit.norm = blocks, norm

    def enter(self, i: int) -> None:
        """Block `i` comes to the device."""
        self.at, self.block = i, self.vit.blocks[i].to(self.device)

    def read(self, *points: str) -> Iterator[list[Tensor]]:
        """What the block has at `points`, of each batch, on the device."""
        rope = self.ropes[self.at]
        keywords = {} if rope is None else {"rope": rope.to(self.device)}
        names = [f"blocks.{self.at}.{point}" for point in points]
        for x in self.tokens:
            with taps(self.vit, names) as found:
                self.block(x.to(self.device), **keywords)
            yield [found[name] for name in names]

    def leave(self) -> None:
        """The tokens pass the block, which goes back to the CPU."""
        self.tokens = [x.cpu() for (x,) in self.read("rc2")]
        self.block.cpu()
        if self.at + 1 == len(self.vit.blocks):
            self.vit.train(self.training)


def solve(
    layer: Layer, mine: Walk, theirs: Walk, weights: Tensor, add_up: Callable[[Tensor], object] | None = None
) -> None:
    """Ridge regression of what the student's stream lacks on what the layer reads.

    Args:
        weights: of the tokens, [N].
    """
    linear, add_up = layer.linear, add_up or (lambda sums: None)
    origin, sums = None, None
    for (x, stream), (target,) in zip(mine.read(layer.reads, layer.joins), theirs.read(layer.joins), strict=True):
        x, lacking = F.pad(x, (0, 1), value=1.0).flatten(0, 1), (target - stream).flatten(0, 1)  # the bias reads 1
        if origin is None:  # near the mean: far from it fp32 loses the variance in the products
            origin = x.sum(0)
            add_up(origin)
            origin = torch.zeros_like(origin) if linear.bias is None else origin / origin[-1]
            origin[-1] = 0.0
        x = x - origin
        weighted = (x.unflatten(0, (-1, len(weights))) * weights[:, None]).flatten(0, 1).T
        new = torch.cat([weighted @ x, weighted @ lacking], 1).double()
        sums = new if sums is None else sums + new
    add_up(sums)
    products, outer = sums.split([len(sums), linear.out_features], 1)
    variance = (products.diagonal()[:-1] - products[-1, :-1].square() / products[-1, -1]).mean()
    penalty = torch.full_like(products[0], RIDGE * variance)
    penalty[-1] = 0.0
    if linear.bias is None:
        products, outer, penalty = products[:-1, :-1], outer[:-1], penalty[:-1]
    change = torch.linalg.solve(products + penalty.diag(), outer)  # [inputs, D], in units of the stream
    if layer.gain is not None:
        gain = layer.gain.double()
        change = torch.where(gain.abs() > SILENT * gain.abs().mean(), change / gain, 0.0)
    linear.weight += change[: linear.in_features].T
    if linear.bias is not None:
        linear.bias += change[-1] - origin[:-1].double() @ change[:-1]
