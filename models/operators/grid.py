"""Which rows and columns the tokens of an attention are: timm's blocks hand it tokens alone."""

import math

import torch
from torch import Tensor, nn


class PatchGrid:
    """The patch grid of a ViT, which all attentions of it share; what a number of patches is laid out as.

    An image that the ViT patches says so on its way (a hook on `patch_embed`). Of tokens that come from elsewhere, as
    where a block is called by itself, it is what `note` was told; else the grid that the ViT was built for; else a
    square. Of grids with one number of patches the last seen counts, so a backward pass that makes blocks again
    (activation checkpointing) must not be held back across a forward of 4 x 8 and one of 8 x 4.
    """

    def __init__(self, patch_embed: nn.Module) -> None:
        self.patch_embed = patch_embed
        self.seen: dict[int, tuple[int, int]] = {}
        patch_embed.patch_grid = self
        patch_embed.register_forward_pre_hook(note_image)

    def note(self, rows: int, columns: int) -> None:
        """So many patches are laid out so."""
        self.seen[rows * columns] = (rows, columns)

    def note_image_size(self, height: int, width: int) -> None:
        """`note` of an image's size in pixels."""
        self.note(*self.patch_embed.dynamic_feat_size((height, width)))

    def of(self, patches: int) -> tuple[int, int]:
        """Rows and columns.

        Raises:
            ValueError: they are not known, and are no square.
        """
        built = tuple(self.patch_embed.grid_size or ())
        if isinstance(patches, torch.fx.Proxy):
            return built  # a graph of torch.fx holds for one size
        side = math.isqrt(patches)
        for grid in (self.seen.get(patches), built, (side, side)):
            if grid and grid[0] * grid[1] == patches:
                return grid
        raise ValueError(f"{patches} patches: their rows and columns are not known; tell them with note_image_size")


def note_image(self: nn.Module, args: tuple[Tensor]) -> None:
    """A forward pre-hook of `patch_embed`."""
    if not torch.jit.is_scripting():
        if not isinstance(args[0], torch.fx.Proxy):
            self.patch_grid.note_image_size(int(args[0].shape[-2]), int(args[0].shape[-1]))
