"""Fit and test the probes of a group of feature vectors of equal width; write each probe to a file of its own."""

import json
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import UserError
from trainer.probe.settings import Probe
from trainer.probe.solve import Blocks, Probes, logistic, ridge, statistics
from trainer.probe.store import Array, Store

CPU_BYTES = 2**27  # of features and solver state that a group may hold, per core; larger features are streamed
BLOCK_BYTES = 2**20  # of features in a block on CPUs: it stays in the cache from product to product


@dataclass(frozen=True)
class Vector:
    """What one probe reads: a module of a model, pooled."""

    model: str
    tap: str
    pooling: str
    width: int
    keys: tuple[str, ...]  # of the arrays that it joins

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tap}.{self.pooling}"


@dataclass
class Fit:
    """A vector's probe at the penalty that the validation images chose, and how it did."""

    vector: Vector
    penalty: float
    validation: dict[float, int]  # penalty -> number of correct images
    iterations: int
    gap: float  # see `Probes`
    right: dict[str, np.ndarray]  # data set, `validation` too -> bool [images]


def vectors_of(arrays: list[Array], wanted: list[str]) -> list[Vector]:
    """The vectors that `wanted` poolings make of the arrays. A tap without prefix tokens has the mean alone."""
    by_tap: dict[tuple[str, str], dict[str, Array]] = {}
    for array in arrays:
        by_tap.setdefault((array.model, array.tap), {})[array.pool] = array
    found = []
    for (model, tap), pools in by_tap.items():
        for pooling in wanted if "prefix" in pools else ["mean"]:
            parts = [pools[pool] for pool in (("prefix", "mean") if pooling == "both" else (pooling,))]
            found.append(Vector(model, tap, pooling, sum(p.width for p in parts), tuple(p.key for p in parts)))
    return found


def groups_of(vectors: list[Vector], store: Store, problems: int, device: torch.device) -> list[list[Vector]]:
    """Vectors of equal width that are fitted side by side, as many as fit in memory. The widest come first.

    Args:
        problems: penalties x classes.
    """
    groups: list[list[Vector]] = []
    for vector in sorted(vectors, key=lambda v: -v.width):
        images = len(store.splits["fit"].indices)
        most = memory(device) // (4 * vector.width * (images + 30 * problems + 6 * vector.width))
        if device.type == "cpu":
            most = min(most, BLOCK_BYTES // (4 * vector.width * min(images, store.rows)))
        if groups and groups[-1][0].width == vector.width and len(groups[-1]) < most:
            groups[-1].append(vector)
        else:
            groups.append([vector])
    return groups


def fit_groups(
    store: Store, groups: list[list[Vector]], classes: int, options: Probe, folder: Path, device: torch.device
) -> Generator[None]:
    """Fit the groups, one per iteration; see `fit_group`.

    On CPUs each core has a thread with a group of its own: such small products gain little from several cores. So the
    results are the same bits on any number of cores.
    """
    if device.type != "cpu":
        for group in groups:
            yield fit_group(store, group, classes, options, folder, device)
        return
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for fitted in [pool.submit(fit_group, store, group, classes, options, folder, device) for group in groups]:
                yield fitted.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)


def memory(device: torch.device) -> int:
    """Bytes that a group may take on a device. It is the same on all ranks, so that they form the same groups."""
    return CPU_BYTES if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory // 8


def fit_group(
    store: Store, group: list[Vector], classes: int, options: Probe, folder: Path, device: torch.device
) -> None:
    """Fit a group's vectors on the split `fit`, choose penalties on `validation`, test on every test set, write all.

    Among penalties of equal accuracy the smallest C wins, the strongest. Among classes of equal score the first wins.

    Raises:
        UserError: features are not finite, or a fit cannot be written to `folder`.
    """
    keys = [vector.keys for vector in group]
    hold = 8 * len(store.splits["fit"].indices) * group[0].width * len(group) <= memory(device)
    raw = _held(lambda: store.blocks("fit", keys, device), hold)
    stats = statistics(raw, classes)
    bad = [vector.name for vector, ok in zip(group, stats.gram_MDD.isfinite().all(-1).all(-1), strict=True) if not ok]
    if bad:
        raise UserError(f"{bad[0]}: has features that are not finite; try --train.bf16 false and --probe.dtype fp32")
    if options.solver == "ridge":
        probes = ridge(stats, options.penalties)
    else:
        standardised = _held(lambda: ((stats.standardise(x), y) for x, y in raw()), hold)
        probes = logistic(standardised, stats, options.penalties, options.tolerance)

    def right(split: str, chosen: Probes) -> Tensor:
        """Whether each image gets its class: bool [M, P, N]."""
        blocks = store.blocks(split, keys, device)
        return torch.cat([chosen.predict(stats.standardise(x)) == y for x, y in blocks], -1).cpu()

    on_validation = right("validation", probes)
    hits_MP = on_validation.sum(-1)
    order = sorted(range(len(options.penalties)), key=options.penalties.__getitem__)
    best = torch.tensor(order)[hits_MP[:, order].argmax(1)]
    chosen = probes.at(best.to(device))
    on_tests = {name: right(name, chosen)[:, 0] for name in store.splits if name not in ("fit", "validation")}
    for m, vector in enumerate(group):
        rights = {"validation": on_validation[m, best[m]], **{name: hit[m] for name, hit in on_tests.items()}}
        fit = Fit(
            vector,
            options.penalties[best[m]],
            dict(zip(options.penalties, hits_MP[m].tolist(), strict=True)),
            int(chosen.iterations_MP[m, 0]),
            float(chosen.gap_MP[m, 0]),
            {name: hit.numpy() for name, hit in rights.items()},
        )
        probe = {"mean": stats.mean_MD[m], "std": stats.std_MD[m]}
        probe |= {"weight": chosen.weight_MPKD[m, 0], "bias": chosen.bias_MPK[m, 0]}
        _keep(folder, fit, probe)


def _keep(folder: Path, fit: Fit, probe: dict[str, Tensor]) -> None:
    """Write a fit, and the probe itself: class scores are `(x / |x| - mean) / std @ weight + bias`."""
    tensors = {name: t.float().cpu().contiguous() for name, t in probe.items()}
    tensors |= {f"right.{name}": torch.from_numpy(np.packbits(right)) for name, right in fit.right.items()}
    described: dict[str, Any] = asdict(fit) | {"right": {name: len(right) for name, right in fit.right.items()}}
    described["validation"] = list(fit.validation.items())
    path = folder / f"{fit.vector.name}.safetensors"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, {"fit": json.dumps(described)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); make room, then run the same command again") from error


def kept(folder: Path, vector: Vector) -> Fit | None:
    """The fit of a vector that was written before, or None."""
    try:
        with safe_open(folder / f"{vector.name}.safetensors", "np") as file:
            described = json.loads(file.metadata()["fit"])
            right = {n: file.get_tensor(f"right.{n}") for n in described["right"]}
    except (OSError, SafetensorError):
        return None
    described["right"] = {n: np.unpackbits(bits, count=described["right"][n]).astype(bool) for n, bits in right.items()}
    return Fit(**described | {"vector": vector, "validation": dict(map(tuple, described["validation"]))})


def _held(blocks: Blocks, hold: bool) -> Blocks:
    """The same blocks, read once and held in memory where they may be."""
    if not hold:
        return blocks
    held = list(blocks())
    return lambda: held
