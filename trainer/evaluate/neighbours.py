"""k nearest neighbours by cosine: their vote on a label, and whether two models see the same ones."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.probe.store import Store

TEMPERATURE = 0.07  # of the votes, as DINO takes it, arXiv 2104.14294
QUERIES = 2**14  # that are compared at once


def nearest(queries_QD: Tensor, bank: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest rows of the bank for each query: cosines and row numbers, [Q, count], nearest first.

    Args:
        bank: blocks [N, D] of its rows, in order, on the queries' device.
    """
    queries_QD = F.normalize(queries_QD, dim=-1)
    found, at, start = queries_QD.new_empty(len(queries_QD), 0), None, 0
    for block in bank:
        block = F.normalize(block, dim=-1)
        near = torch.cat([found, queries_QD @ block.mT], 1)
        rows = torch.arange(start, start + len(block), device=block.device).expand(len(queries_QD), -1)
        rows = rows if at is None else torch.cat([at, rows], 1)
        found, order = near.topk(min(count, near.shape[1]))
        at = rows.gather(1, order)
        start += len(block)
    return found, at


def vote(cosines_QN: Tensor, labels_QN: Tensor, classes: int) -> Tensor:
    """The class with most of exp(cosine / 0.07) among the neighbours: [Q, N] twice -> [Q]. Of equal ones the first."""
    weights = (cosines_QN / TEMPERATURE).exp()
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, labels_QN, weights)
    return votes.argmax(1)


def blocks_of(store: Store, splits: Iterable[str], keys: tuple[str, ...], device: torch.device) -> Iterable[Tensor]:
    """Features [N, D] of the images of `splits`, chunk by chunk; the arrays `keys` are joined."""
    for split in splits:
        for x, _ in store.blocks(split, [keys], device):
            yield x[0]


def labels_of(store: Store, splits: Iterable[str]) -> Tensor:
    """Labels int64 of the images of `splits`, in that order."""
    keys = [(store.arrays[0].key,)]
    return torch.cat([y for split in splits for _, y in store.blocks(split, keys, torch.device("cpu"))])


def rows_of(store: Store, split: str, keys: tuple[str, ...], rows: np.ndarray, device: torch.device) -> Tensor:
    """Features [n, D] of the images `rows` (ascending) of a split."""
    parts, start = [], 0
    for x in blocks_of(store, [split], keys, device):
        inside = rows[(rows >= start) & (rows < start + len(x))] - start
        parts.append(x[torch.from_numpy(inside).to(device)])
        start += len(x)
    return torch.cat(parts)


def votes(
    store: Store, keys: tuple[str, ...], rows: np.ndarray, count: int, classes: int, device: torch.device
) -> np.ndarray:
    """Classes of the test images `rows` by their nearest training images, int64 [n]."""
    bank, said = ("fit", "validation"), []
    labels = labels_of(store, bank).to(device)
    for part in torch.from_numpy(rows).split(QUERIES):
        queries = rows_of(store, "val", keys, part.numpy(), device)
        cosines, at = nearest(queries, blocks_of(store, bank, keys, device), count)
        said.append(vote(cosines, labels[at], classes).cpu())
    return torch.cat(said).numpy() if said else np.zeros(0, np.int64)


def overlaps(
    store: Store, keys: tuple[str, ...], others: tuple[str, ...], rows: np.ndarray, count: int, device: torch.device
) -> np.ndarray:
    """Share of an image's `count` nearest images that two models have in common, fp64 [n]: mutual k-NN alignment.

    It needs no labels and features of no equal width: arXiv 2405.07987, section 2.

    Args:
        keys, others: the features of the one model, and of the other.
        rows: images of the test set that are asked about; neighbours are sought in all of it.
    """
    shares = []
    for part in torch.from_numpy(rows).split(QUERIES):
        near = []
        for of in (keys, others):
            queries = rows_of(store, "val", of, part.numpy(), device)
            _, at = nearest(queries, blocks_of(store, ["val"], of, device), count + 1)
            itself = at == part[:, None].to(device)
            missing = ~itself.any(1)  # among more than `count` that are alike
            itself[missing, -1] = True
            near.append(at[~itself].view(len(at), -1))
        common = (near[0][:, :, None] == near[1][:, None]).any(2)
        shares.append(common.double().mean(1).cpu())
    return torch.cat(shares).numpy() if shares else np.zeros(0)
