"""Read any module of any block of a ViT by its name, through forward hooks."""

import contextlib
import re
from collections.abc import Iterable, Iterator

from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

# name in a block -> (sub-module, which side of it). "attn_in" is what attention reads, "heads" what it gives before its
# projection; "act" of a gated MLP is the activation alone, before the gate.
POINTS: dict[str, tuple[str, str]] = {
    "ln1": ("norm1", "out"),
    "attn_in": ("attn", "in"),
    "heads": ("attn.proj", "in"),
    "mha": ("attn", "out"),
    "rc1": ("norm2", "in"),
    "ln2": ("norm2", "out"),
    "fc1": ("mlp.fc1", "out"),
    "act": ("mlp.act", "out"),
    "fc2": ("mlp.fc2", "out"),
    "rc2": ("", "out"),
}


@contextlib.contextmanager
def taps(vit: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, each forward of `vit` fills the mapping with the tensors called `names`, [B, N, *].

    Names are `blocks.<i>.<point>` with a point from `POINTS` (`*` for every block) and `norm`, the final tokens,
    exactly what `forward_features` returns.

    Raises:
        ValueError: a name that `vit` does not have.
    """
    read: dict[str, Tensor] = {}
    hooks = []

    def record(key: str, side: str):
        def after(_module: nn.Module, _args: tuple, out: Tensor) -> None:
            read[key] = out

        def before(_module: nn.Module, args: tuple) -> None:
            read[key] = args[0]

        return after if side == "out" else before

    try:
        for key, module, side in (found for name in names for found in _resolve(vit, name)):
            register = module.register_forward_hook if side == "out" else module.register_forward_pre_hook
            hooks.append(register(record(key, side)))
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def _resolve(vit: nn.Module, name: str) -> list[tuple[str, nn.Module, str]]:
    if name == "norm":
        return [(name, vit.norm, "out")]
    match = re.fullmatch(r"blocks\.(\*|\d+)\.(\w+)", name)
    depth = len(vit.blocks)
    if match is None or match[2] not in POINTS or (match[1] != "*" and int(match[1]) >= depth):
        raise ValueError(f"tap {name!r}: unknown; use norm or blocks.<0..{depth - 1} or *>.<{'|'.join(POINTS)}>")
    blocks = range(depth) if match[1] == "*" else [int(match[1])]
    found = []
    for i in blocks:
        path, side = POINTS[match[2]]
        if match[2] == "rc1" and isinstance(vit.blocks[i], ResPostBlock):
            path = "mlp"  # its norms follow attention and MLP, so the residual stream enters the MLP itself
        try:
            found.append((f"blocks.{i}.{match[2]}", vit.blocks[i].get_submodule(path), side))
        except AttributeError as error:
            raise ValueError(f"tap {name!r}: block {i} ({type(vit.blocks[i]).__name__}) has no {path}") from error
    return found
