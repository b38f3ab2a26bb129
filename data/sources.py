"""Folders of images as they lie on disk."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.images import is_image, read_image
from data.paths import existing_folder

__all__ = [
    "IMAGE_SUFFIXES", "Found", "ImageFolder", "find_images", "read_image", "refuse_splits", "splits_among",
    "splits_by_kind",
]  # fmt: skip

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SYSTEM = ("desktop.ini", "thumbs.db")  # what file managers leave, beside hidden files
_SPLITS = {
    "train": r"train(ing)?",
    "val": r"val(id(ation)?)?|dev|eval(uation)?",
    "test": r"test(ing)?",
}
_SPLIT = re.compile("|".join(f"(?P<{k}>({v})([-_ ]?(set|split|images?|data|[0-9]+))?)" for k, v in _SPLITS.items()))


class ImageFolder:
    """The images under a folder: one class per subfolder (`root/class/image.jpg`, sorted by name), or unlabelled.

    Links to files and to folders are followed, wherever they lead: such folders are often made of them. Names of
    classes are in Unicode's normal form C, in which they are sorted too.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, classes without images, or of one name, or without one; splits such as train and
            val in it; or a link that leads back to a folder above it.

    Attributes:
        classes: names of the classes, or None when unlabelled.
        why: how the choice was made, for the screen.
        passed_over: files and hidden folders that were not taken, relative to the root; without hidden files.
    """

    def __init__(self, root: str | Path, unlabelled: bool = False):
        self.root = existing_folder(root, "give a folder of images")
        found = find_images(self.root)
        self.files, self.passed_over = found.files, found.passed_over
        if not self.files:
            raise ValueError(f"{self.root}: holds no images ({' '.join(IMAGE_SUFFIXES)}){in_words(found.passed_over)}")
        if not unlabelled:
            refuse_splits(self.root, self.files)
        depths = {len(file.parts) for file in self.files}
        folders = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")
        self.classes: list[str] | None = None
        self._labels: dict[str, int] = {}
        if unlabelled:
            self.why = "unlabelled, as asked"
        elif 1 in depths:
            self.why = f"unlabelled: there are images directly in {self.root}"
        elif depths != {2}:
            self.why = f"unlabelled: there are images deeper than {self.root}/CLASS/"
        elif len(folders) == 1:
            self.why = f"unlabelled: {self.root} has a single subfolder, which is no choice of classes"
        else:
            self.why = f"labelled: {len(folders)} classes, a subfolder of {self.root} each"
            names = self._class_names(folders)
            self.classes = sorted(names.values())
            self._labels = {folder: self.classes.index(name) for folder, name in names.items()}

    def _class_names(self, folders: list[str]) -> dict[str, str]:
        """The class of each folder; checks them, and says in `why` which are hard to tell apart."""
        empty = sorted(set(folders) - {file.parts[0] for file in self.files})
        if empty:
            listed = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
            raise ValueError(f"{self.root}: class folders without images: {listed}; remove them, or pass --unlabelled")
        names = {folder: unicodedata.normalize("NFC", folder).strip() for folder in folders}
        if "" in names.values():
            raise ValueError(f"{self.root}: a class folder's name is blank; rename it, or pass --unlabelled")
        for same, of in ((str, "look the same"), (str.casefold, "differ only by case")):
            alike = defaultdict(list)
            for folder, name in names.items():
                alike[same(name)].append(folder)
            several = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
            if several and same is str:
                raise ValueError(f"{self.root}: class folders whose names {of}: {several[0]}; merge or rename them")
            if several:
                self.why += f" (names that {of}: {', '.join(several[:10])})"
        return names

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray] | tuple[np.ndarray, int]:
        """(image,) or (image, label); raises what `read_image` does."""
        pixels = read_image(self.root / self.files[index])
        return (pixels, self.label(index)) if self.classes else (pixels,)

    def label(self, index: int) -> int:
        """The label of a file; of a folder that has classes."""
        return self._labels[self.files[index].parts[0]]

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])


class Found:
    """What is under a folder, relative to it.

    Attributes:
        files: the images, sorted by folder, then by name.
        passed_over: files that are no images, and hidden folders.
    """

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.passed_over: list[Path] = []


def find_images(root: Path, by_content: bool = True) -> Found:
    """The images under a folder: files of a known suffix, and others whose content is an image.

    Args:
        by_content: whether to open the files of other suffixes.

    Raises:
        ValueError: a link leads back to a folder above it.
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:  # without it a folder would be passed over
        raise error

    found = Found()
    chains = {str(root): (root.resolve(),)}  # where a folder really lies, after those that led to it
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        inside = Path(folder).relative_to(root)
        found.passed_over += [inside / name for name in sorted(folders) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        chain = chains.pop(folder)
        for name in folders:
            path = os.path.join(folder, name)
            place = Path(path).resolve() if os.path.islink(path) else chain[-1] / name
            if any(above.is_relative_to(place) for above in chain):
                raise ValueError(f"{path}: leads back to a folder that it lies in; remove the link")
            chains[path] = (*chain, place)
        for name in sorted(files):
            if name.startswith(".") or name.lower() in _SYSTEM:
                continue
            known = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
            taken = known or (by_content and is_image(Path(folder, name)))
            (found.files if taken else found.passed_over).append(inside / name)
    return found


def in_words(passed_over: Sequence[Path]) -> str:
    """What was passed over, to end a line with; empty where nothing was."""
    if not passed_over:
        return ""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in passed_over).most_common(5)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
    number = f"{len(passed_over)} other file{'s' if len(passed_over) > 1 else ''}"
    return f"; {number} passed over ({counts}), such as {passed_over[0]}"


def splits_among(names: Iterable[str]) -> list[str]:
    """Those of some names that mean the splits of a data set, one per kind of split: train, val and test."""
    return sorted(splits_by_kind(names).values())


def splits_by_kind(names: Iterable[str]) -> dict[str, str]:
    """Those of some names that mean the splits of a data set, by `train`, `val` and `test`."""
    return {match.lastgroup: name for name in sorted(names) if (match := _SPLIT.fullmatch(name.lower()))}


def refuse_splits(root: Path, files: Sequence[Path]) -> None:
    """Refuses a folder that holds a data set's splits: together they would train on what is kept to judge by.

    Args:
        root: the folder.
        files: the images in it, relative to it.

    Raises:
        ValueError: a folder in it holds two splits, or all its images lie in one split. The message names what to give.
    """
    inside: dict[Path, set[str]] = defaultdict(set)
    for folder in {file.parent for file in files}:
        for each in (folder, *folder.parents[:-1]):
            inside[each.parent].add(each.name)
    for above, folders in sorted(inside.items()):
        names = splits_among(folders)
        inside_one = len(names) == 1 and above == Path() and {file.parts[0] for file in files} == {*names}
        alone = inside_one and any(len(file.parts) > 2 for file in files)  # its own folders are classes, maybe
        if len(names) > 1 or alone:
            first = root / above / names[0]
            example = f"python -m data.write {first} {first.name}.beton"
            given = ("splits " if len(names) > 1 else "split ") + " and ".join(names)
            raise ValueError(f"{root / above}: holds the {given}; write each as a file of its own: {example}")
