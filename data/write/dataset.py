"""The whole of one writing: a dataset -> a .beton file with the JSON beside it.

A file is written beside its final name and renamed when it is complete.
"""

import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import corrupt
from data.beton import inspect, side_digest, side_file
from data.decode import IGNORE
from data.given import name_of
from data.images import MAX_SIDE
from data.paths import expand
from data.sources import splits_among
from data.write import side
from data.write.items import Corrupted, Items
from data.write.pages import fields_of, page_size_for, write_pages


def write(
    dataset: Any,
    out: str | Path,
    *,
    max_side: int | None = None,
    quality: int = 90,
    raw_share: float | str = "smart",
    smart_threshold: int = 100_000,
    workers: int | None = None,
    skip_unreadable: bool = False,
    corruption: tuple[str, int] | None = None,
    seed: int = 0,
    image_key: str | None = None,
    label_key: str | None = None,
    mask_key: str | None = None,
    classes: Sequence[str] | None = None,
    mask_classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    allow_empty: bool = False,
    source: str | None = None,
    progress: bool = True,
) -> dict:
    """Writes a dataset as a .beton file, with a JSON beside it (`OUT.json`).

    Args:
        dataset: an indexable object with a length, such as a torchvision or Hugging Face dataset. Its items are an
            image, (image, label), (image, mask), (image, label, mask), or a dict. An image is a PIL image of 8 bits per
            channel or a uint8 array [H, W, 3], see `data.images`. A label is one whole number. A mask is integers
            [H, W] beside its image, as an array or a PIL image: classes, or 255 where none is labelled. Each writing
            process opens again what files the dataset had open.
        out: the file; replaced only when the new one is complete.
        max_side: larger images are shrunk to this longer side, pixels.
        quality: of the JPEGs, 1..100.
        raw_share: share of the images kept as raw pixels (0..1; raw loads fastest and takes most room), or "smart":
            raw up to `smart_threshold`, JPEG above.
        smart_threshold: bytes of raw pixels.
        workers: processes; by default one per core.
        skip_unreadable: leave out the items that cannot be read, instead of failing.
        corruption: (name, severity) of `data.corrupt`, to write a shifted copy. The images are corrupted after
            `max_side`.
        seed: of the corruption's noise, which is a function of it and of an item's index.
        image_key, label_key, mask_key: of items that are dicts. All items must have a key that is given. By default
            `image`, and `label` and `mask` where items have them.
        classes: names of the classes; by default the dataset's own (`classes`, or the label feature's `names`).
        mask_classes: names of the masks' classes; by default the dataset's own (`mask_classes`), else their numbers.
        palette: (R, G, B) of each of them, for pictures; by default the dataset's own (`palette`), else Pascal VOC's.
        allow_empty: let masks' classes have no pixel: a small validation set may, a training set should not.
        source: what to record as the source; by default the dataset's type.

    Returns:
        What the JSON holds: classes, count, source, settings, bytes, sha256, skipped (unreadable items), unused (keys
        of items), passed_over (files of a folder), digest; with masks also mask_classes, palette, pixels (of each
        class) and unlabelled (pixels without one).

    Raises:
        ValueError: a setting is out of its range, the dataset is empty, items are unreadable (the message names them)
            or not of one kind, names or keys are given that fit no item, or classes of masks have no pixel.
        OSError: the file cannot be written, such as no space left. Nothing was overwritten.
    """
    out = expand(out)
    _check_settings(max_side, quality, raw_share, smart_threshold, workers)
    if corruption is not None:
        corrupt.check(*corruption)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file such as {out / 'train.beton'}")
    if len(dataset) == 0:
        raise ValueError(f"{source or type(dataset).__name__}: holds no images")
    asked = {"label": classes, "mask": palette if mask_classes is None else mask_classes}
    names = side.class_names(dataset, label_key, classes)
    mask_classes = getattr(dataset, "mask_classes", None) if mask_classes is None else mask_classes
    palette = getattr(dataset, "palette", None) if palette is None else palette
    read = Items(dataset, image_key, label_key, mask_key, IGNORE if mask_classes is None else len(mask_classes))
    if corruption is not None:
        read = Corrupted(read, max_side, *corruption, seed)
    if len(splits := splits_among(names or ())) > 1:
        raise ValueError(f"classes: are the splits {' and '.join(splits)}; write each split as a file of its own")
    fields = fields_of(read, max_side, quality, raw_share, smart_threshold)
    for part, of in asked.items():
        if of is not None and part not in fields:
            raise ValueError(f"classes of {part}s are given, but the items have no {part}{_among(read.unused)}")
    if progress and read.unused:
        print(f"not used of the items: {', '.join(read.unused)}", file=sys.stderr)
    unused, left = read.unused, getattr(dataset, "passed_over", ())

    cores = len(os.sched_getaffinity(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    side_aside = out.with_name(f".{out.name}.{os.getpid()}.json.tmp")
    try:
        unreadable, pixels = write_pages(read, aside, fields, page_size_for(max_side), workers or cores, progress)
        skipped = [{"name": name_of(dataset, index), "reason": reason} for index, reason in sorted(unreadable.items())]
        if skipped:
            _report(skipped, len(dataset), progress)
        if skipped and (not skip_unreadable or len(skipped) == len(dataset)):
            mend = "nothing is left" if skip_unreadable else "mend or remove them, or pass --skip_unreadable"
            first = f"{skipped[0]['name']} ({skipped[0]['reason']})"
            raise ValueError(f"{len(skipped)} of {len(dataset)} images unreadable, the first is {first}; {mend}")
        info = inspect(aside)  # what was written reads back
        if names is not None and info.has_labels and info.max_label >= len(names):
            raise ValueError(f"classes: has {len(names)} names, but there is label {info.max_label}; give all names")
        content = {
            "classes": names if "label" in fields else None,
            "count": len(dataset) - len(skipped),
            "source": source or f"{type(dataset).__module__}.{type(dataset).__qualname__}",
            "settings": {
                "max_side": max_side, "quality": quality, "raw_share": raw_share, "smart_threshold": smart_threshold,
                "corruption": corruption and {"name": corruption[0], "severity": corruption[1], "seed": seed},
            },
            "bytes": aside.stat().st_size,
            "sha256": side.sha256(aside),
            "skipped": skipped,
            "unused": unused,
            "passed_over": side.passed_over(left),
        }  # fmt: skip
        if "mask" in fields:
            content |= side.masks(pixels, mask_classes, palette, allow_empty, content["source"])
        content["digest"] = side_digest(content, info.digest)
        side_aside.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(aside, out)
        os.replace(side_aside, side_file(out))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"{out.parent}: no space left for {out.name}; make room or choose another folder"
            raise OSError(error.errno, what) from error
        raise
    finally:
        aside.unlink(missing_ok=True)
        side_aside.unlink(missing_ok=True)
    return content


def _check_settings(max_side, quality, raw_share, smart_threshold, workers) -> None:
    checks = (
        ("max_side", max_side, max_side is None or 1 <= max_side <= MAX_SIDE, f"a number of pixels up to {MAX_SIDE}"),
        ("quality", quality, 1 <= quality <= 100, "in 1..100"),
        ("raw_share", raw_share, raw_share == "smart" or (not isinstance(raw_share, str) and 0 <= raw_share <= 1),
         'a share in 0..1, or "smart"'),
        ("smart_threshold", smart_threshold, smart_threshold >= 0, "a number of bytes"),
        ("workers", workers, workers is None or workers >= 1, "at least 1"),
    )  # fmt: skip
    for name, value, good, want in checks:
        if not good:
            raise ValueError(f"{name} {value}: must be {want}")


def _among(keys: Sequence[str]) -> str:
    return f" (their other keys: {', '.join(keys)})" if keys else ""


def _report(skipped: list[dict], total: int, progress: bool) -> None:
    if not progress:
        return
    for entry in skipped[:20]:
        print(f"unreadable: {entry['name']}: {entry['reason']}", file=sys.stderr)
    more = f", {len(skipped) - 20} of them not shown" if len(skipped) > 20 else ""
    print(f"{len(skipped)} of {total} images unreadable{more}", file=sys.stderr)
