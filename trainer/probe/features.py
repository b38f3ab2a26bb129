"""Pooled features of every tapped module: the hooks that read them, in one pass over the images for all models."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor, nn

from models import tap_names, taps
from trainer.probe.store import Array, Store

NO_LABEL = -1  # in the store, of images without labels


@contextlib.contextmanager
def tapped(vit: nn.Module, names: list[str], pool: str) -> Iterator[Callable[[], dict[tuple[str, str], Tensor]]]:
    """Within the context each forward pass of `vit` is read.

    Args:
        names: taps without `*`.
        pool: `mean`, `prefix` or `both`. The embedded patches have no prefix token: of them always the mean is read.

    Returns:
        A function that gives what the last forward pass left: {(tap, "mean" or "prefix"): [B, width] fp32}, in the
        order of `names`.
    """
    patches = [name for name in names if name == "patch_embed"]
    with taps(vit, patches, "mean") as first, taps(vit, [n for n in names if n not in patches], pool) as rest:

        def read() -> dict[tuple[str, str], Tensor]:
            vectors = {}
            for name in names:
                if name in patches:
                    vectors[name, "mean"] = first[name]
                elif pool == "both":
                    vectors[name, "prefix"], vectors[name, "mean"] = rest[name].unbind(1)
                else:
                    vectors[name, pool] = rest[name]
            return vectors

        yield read


class Reader:
    """Reads the features of all models in one pass over a batch of images."""

    def __init__(self, vits: dict[str, nn.Module], names: list[str], pools: dict[str, str]) -> None:
        """`names`: taps with or without `*`. `pools`: for each model `mean`, `prefix` or `both`.

        Raises:
            ValueError: a tap that a model does not have.
        """
        self.vits, self.names, self.pools = vits, {m: tap_names(vit, names) for m, vit in vits.items()}, pools
        size = next(iter(vits.values())).patch_embed.img_size
        with self:
            one = self.read(torch.zeros(1, 3, *size))
        self.arrays = [Array(*key, x.shape[-1]) for key, x in one.items()]

    def __enter__(self) -> "Reader":
        """Puts the hooks on the models."""
        with contextlib.ExitStack() as stack:
            self._reads = {
                model: stack.enter_context(tapped(vit, self.names[model], self.pools[model]))
                for model, vit in self.vits.items()
            }
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    @torch.no_grad()
    def read(self, image: Tensor) -> dict[tuple[str, str, str], Tensor]:
        """[B, 3, H, W] -> {(model, tap, pool): [B, width] fp32}, in the order of `arrays`."""
        found = {}
        for model, vit in self.vits.items():
            vit.forward_features(image.to(next(vit.parameters()).dtype))
            found |= {(model, *key): x for key, x in self._reads[model]().items()}
        return found


def extract(reader: Reader, store: Store, work: list[tuple[str, int]], loader_of: Callable) -> Generator[None]:
    """Make the chunks in `work`, one per iteration.

    Args:
        loader_of: a split -> a loader that yields its images in order, batches of the store's batch size.
    """
    batches, at = None, None
    rows = {(a.model, a.tap, a.pool): torch.empty(store.rows, a.width, dtype=store.dtype) for a in store.arrays}
    labels, widths = torch.full((store.rows,), NO_LABEL), [a.width for a in store.arrays]
    with reader, contextlib.ExitStack() as open_loader:
        for split, number in work:
            if at is None or at[0] != split:
                open_loader.close()
                loader = open_loader.enter_context(contextlib.closing(loader_of(store.splits[split])))
            if at != (split, number):
                batches = loader.epoch(0, number * store.batches)
            count = 0
            for batch in itertools.islice(batches, store.batches):
                here = slice(count, count + len(batch["image"]))
                labels[here] = batch.get("label", NO_LABEL)
                vectors = torch.cat(list(reader.read(batch["image"]).values()), 1).cpu()  # one wait for a device
                for column, x in zip(rows.values(), vectors.split(widths, 1), strict=True):
                    column[here] = x
                count = here.stop
            store.write(split, number, {key: x[:count] for key, x in rows.items()}, labels[:count])
            at = split, number + 1
            yield
