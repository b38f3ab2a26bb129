"""Images as a user has them: a folder, shards on disk, a Hugging Face dataset. What there is in them, before a file.

`find` says which splits there are, without reading a pixel. `write` of `data.write` takes each of them as a dataset.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data import layouts, segmentation
from data.beton import Info
from data.paths import existing_folder, expand
from data.sources import ImageFolder, find_images, in_words, splits_by_kind

HUB = "hf:"  # before the name of a dataset of the Hugging Face hub
SHARDS = (".parquet", ".tar")  # Parquet, and WebDataset
_LABELS = ("label", "labels", "cls", "class", "fine_label", "target")  # columns, where none is a ClassLabel


@dataclass
class Images:
    """The images of one split.

    Attributes:
        dataset: for `data.write`.
        why: what was taken for what, for the screen.
        labels: int64 [n]; None without.
        classes: names of the classes, or of the masks' classes.
        keys: `image_key` and `label_key` of `data.write`.
    """

    dataset: Any
    why: str
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    masks: bool = False
    keys: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def part(self, indices: np.ndarray, why: str) -> "Images":
        """Some of them, in their order."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, dataset=Part(self.dataset, indices), labels=labels, why=why)

    def how(self) -> dict[str, Any]:
        """The keywords of `data.write` that say what an item holds."""
        return self.keys | ({"classes": self.classes} if self.classes and self.labels is not None else {})

    def expected(self, path: Path) -> Info:
        """What the file will hold, were it written now; sizes and sums are not known yet."""
        labelled = self.labels is not None
        return Info(
            path=path, num_samples=len(self), has_labels=labelled, has_masks=self.masks,
            max_label=int(self.labels.max()) if labelled else None, classes=self.classes if labelled else None,
            mask_classes=self.classes if self.masks else None, palette=getattr(self.dataset, "palette", None),
            sha256=None, max_size=(0, 0), fields=(), digest=None, samples=None,
        )  # fmt: skip


class Part:
    """Some items of a dataset; as a dataset for `data.write`."""

    def __init__(self, whole: Any, indices: np.ndarray):
        self.whole, self.indices = whole, indices
        for name in ("classes", "mask_classes", "palette"):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.whole[int(self.indices[index])]

    def name(self, index: int) -> str:
        return name_of(self.whole, int(self.indices[index]))


def name_of(dataset: Any, index: int) -> str:
    """What to call an item: its file, where it is one."""
    named = isinstance(dataset, ImageFolder | layouts.Files | layouts.Arrays | segmentation.Pairs | Part)
    return dataset.name(index) if named else f"item {index}"


def is_given(spec: str | Path | None) -> bool:
    """Whether a data setting names images that are to be written first, not a .beton file or `digits`."""
    if spec is None or str(spec).partition(":")[0] == "digits":  # the embedded data set, whatever lies here
        return False
    path = expand(spec)
    return str(spec).startswith(HUB) or path.is_dir() or path.suffix.lower() in SHARDS


def find(spec: str, scratch: Path, masks: bool = False) -> dict[str, Images]:
    """The splits `train` and `val` that are there; `train` alone where the images are not split. A test split is left.

    Args:
        spec: a folder of images (a subfolder per class, or unlabelled), of `train/` and `val/` with such in them, of a
            data set as it is distributed, or of shards; a shard; `hf:OWNER/NAME`.
        scratch: an empty folder, in which shards are unpacked; to be kept until they are written.
        masks: find images with masks: data sets as they are distributed.

    Raises:
        ValueError, OSError: one line on what does not fit.
    """
    if spec.startswith(HUB) or expand(spec).is_file():
        if masks:
            raise ValueError(f"{spec}: masks are found in folders alone; write it with data.write's mask_key")
        return _from_datasets(spec, scratch)
    root = existing_folder(spec, "give a folder of images")
    if masks:
        known = next((splits for of, splits, _ in segmentation.LAYOUTS.values() if of(root)), None)
        if known is None:
            how = "write them with python -m data.write --task segmentation --masks FOLDER --classes TABLE.csv"
            raise ValueError(f"{root}: is none of {', '.join(segmentation.LAYOUTS)}, so where its masks are is not "
                             f"known; {how}")  # fmt: skip
        return {split: _of(segmentation.open_pairs(root, None, split)) for split in known if split != "test"}
    known = next((splits for of, splits, _ in layouts.LAYOUTS.values() if of(root)), None)
    if known:
        return {split: _of(layouts.open_source(root, None, split)) for split in known if split != "test"}
    if _shards_in(root) and not find_images(root, by_content=False).files:
        return _from_datasets(spec, scratch)
    return {split: _of(ImageFolder(folder)) for split, folder in _splits_in(root).items()}


def stamp(spec: str) -> str:
    """Other than before when an image that `find` finds there has changed: SHA-256, in hex.

    Of files their names, sizes and times are taken: of the last change of the content (mtime), and of anything
    (ctime). To read them would take hours of a large data set, at each start. An image that is written over keeps its
    name, and with care its size and its mtime; its ctime no program can set. Of the hub the revision is taken.

    Raises:
        ValueError, OSError: there is no such folder or dataset.
    """
    if spec.startswith(HUB):
        with _datasets(spec) as datasets:
            return str(datasets.load_dataset_builder(**_where(spec)).hash)
    path = expand(spec)
    root = path if path.is_dir() else path.parent
    files = _files_in(root) if path.is_dir() else [path]
    if layouts.LAYOUTS["domainnet"][0](root):  # its lists lie beside it
        files = [*files, *sorted(root.parent.glob(f"{root.name}_*.txt"))]
    digest = hashlib.sha256()
    for file in files:
        about = os.stat(file)
        said = f"{os.path.relpath(file, root)}\0{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}\n"
        digest.update(said.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files_in(root: Path) -> Iterator[str]:
    """All files under a folder, in an order that does not change; each folder once, wherever links lead."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def hold_out(images: Images, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of those that stay, and of those that are held out: `share` of each class, ascending.

    Which ones depends on their names alone (of images that are no files, on their number): not on a seed, nor on what
    else lies in the folder.
    """
    names = [_inside(images.dataset, i) for i in range(len(images))]
    lots = np.array([int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()) for name in names])
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    order = np.lexsort((lots, labels))
    sizes = np.bincount(labels)
    place = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[labels[order]]
    held = place < (share * sizes + 0.5).astype(np.int64)[labels[order]]
    return np.sort(order[~held]), np.sort(order[held])


def _inside(dataset: Any, index: int) -> str:
    return dataset.files[index].as_posix() if isinstance(dataset, ImageFolder) else name_of(dataset, index)


def _splits_in(root: Path) -> dict[str, Path]:
    """The folders of the splits in a folder, else itself as `train`. A class may be called as a split is."""
    entries = [entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and entry.is_dir()]
    found = splits_by_kind(entries)
    if "train" in found and (len(found) > 1 or len(entries) == 1):
        return {split: root / found[split] for split in ("train", "val") if split in found}
    return {"train": root}


def _of(dataset: Any) -> Images:
    """A dataset of this package's as `Images`."""
    why = dataset.why + in_words(getattr(dataset, "passed_over", ()))
    if isinstance(dataset, segmentation.Pairs):
        return Images(dataset, why, classes=list(dataset.mask_classes), masks=True)
    if isinstance(dataset, ImageFolder):
        labels = [dataset.label(i) for i in range(len(dataset))] if dataset.classes else None
    else:
        labels = dataset.labels
    if labels is None:
        return Images(dataset, why)
    return Images(dataset, why, np.asarray(labels, np.int64), list(dataset.classes) if dataset.classes else None)


def _shards_in(root: Path) -> list[Path]:
    """Files of shards in a folder, or one folder deeper, sorted."""
    return sorted(path for kind in SHARDS for deep in ("*", "*/*") for path in root.glob(deep + kind))


def _from_datasets(spec: str, scratch: Path) -> dict[str, Images]:
    """Splits that Hugging Face's `datasets` reads: of the hub, of a folder of shards, of a shard.

    Raises:
        ValueError: `datasets` is not installed, or cannot read it, or it has no images.
    """
    with _datasets(spec) as datasets:
        found = datasets.load_dataset(**_where(spec), **({} if spec.startswith(HUB) else {"cache_dir": str(scratch)}))
    splits = splits_by_kind(found)
    splits = {kind: splits[kind] for kind in ("train", "val") if kind in splits}
    if "train" not in splits:
        raise ValueError(f"{spec}: has no training split, only {', '.join(found)}")
    return {kind: _of_columns(spec, found[name], name) for kind, name in splits.items()}


@contextmanager
def _datasets(spec: str) -> Iterator[Any]:
    """Hugging Face's package; within it whatever it raises is a ValueError of one line."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{spec}: needs the package datasets; pip install "datasets>=4"') from error
    try:
        yield datasets
    except Exception as error:  # of another's package, over a network: anything
        raise ValueError(f"{spec}: cannot be had ({' '.join(str(error).split())[:300]})") from error


def _where(spec: str) -> dict[str, str]:
    """What `datasets` calls it."""
    if spec.startswith(HUB):
        return {"path": spec.removeprefix(HUB)}
    path = expand(spec)
    if path.is_dir():
        return {"path": str(path)}
    kind = "parquet" if path.suffix.lower() == ".parquet" else "webdataset"
    return {"path": kind, "data_files": str(path)}


def _of_columns(spec: str, dataset: Any, split: str) -> Images:
    """A split of `datasets` as `Images`: which columns are the images and the labels."""
    with _datasets(spec) as datasets:
        kinds = dataset.features
        image = next((name for name, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"it has no column of images, only {', '.join(kinds)}")
        named = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        named = [*(name for name in named if name in _LABELS), *named, *(name for name in _LABELS if name in kinds)]
        label = next(iter(named), None)
        if label is not None and getattr(kinds[label], "dtype", None) == "string":
            dataset = dataset.class_encode_column(label)
        if label is None or "int" not in str(getattr(dataset.features[label], "dtype", "")):
            return Images(
                dataset, f"its split {split}, images of column {image}, unlabelled", keys={"image_key": image}
            )
        labels, classes = np.asarray(dataset[label][:], np.int64), getattr(dataset.features[label], "names", None)
    why = f"its split {split}, images of column {image}, labels of {label}"
    return Images(dataset, why, labels, classes, keys={"image_key": image, "label_key": label})
