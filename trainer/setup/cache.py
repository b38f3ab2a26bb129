"""Images that are given as such (a folder, shards, a dataset of the hub) -> .beton files in a cache.

A folder of the cache holds what was written of one setting: `train.beton`, and `val.beton` where validation images
came with it or were held out. Its name has a key of all that decides what the files hold: names, sizes and times of
the images (see `data.given.stamp`), and how they are written. So a changed image, or another share, gives another
folder, and what is in a folder never changes. It is written aside and renamed, so that it is whole or not there.
"""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import data
from data.given import HUB, Images, find, hold_out, is_given, stamp
from data.paths import cache_folder
from data.write import write
from trainer.config import Settings, UserError
from trainer.output.paths import hold
from trainer.ranks.errors import cause
from trainer.setup.resolution import pair
from trainer.stages.base import Infos

FORM = 1  # of what is written; a change gives other keys


@dataclass(frozen=True)
class Source:
    """Images that a setting names, and where their files are to lie."""

    setting: str  # such as "data.train"
    spec: str
    splits: tuple[str, ...]  # those that are taken of it, where they are there
    share: float  # that is held out, where it has no validation images
    masks: bool
    max_side: int | None
    folder: Path

    @property
    def is_written(self) -> bool:
        """Whether the cache has it."""
        return self.folder.is_dir()

    def files(self) -> dict[str, Path]:
        """The files by their splits, once they are written."""
        paths = {split: self.folder / f"{split}.beton" for split in self.splits}
        return {split: path for split, path in paths.items() if path.is_file()}

    @contextlib.contextmanager
    def opened(self, scratch_in: Path | None = None) -> Iterator[dict[str, Images]]:
        """The images by their splits. Shards are unpacked in a folder in `scratch_in`, for as long."""
        with tempfile.TemporaryDirectory(dir=scratch_in, prefix="unpacked-") as scratch:
            try:
                found = find(self.spec, Path(scratch), self.masks)
            except (ValueError, OSError) as error:
                mend = "write it with python -m data.write --unlabelled"
                raise UserError(f"{self.setting} {str(error).replace('pass --unlabelled', mend)}") from error
            if self.splits == ("val",):  # a setting of its own
                found = {"val": found.get("val", found["train"])}
            elif "val" in self.splits and "val" not in found:
                stay, held = hold_out(found["train"], self.share)
                if len(held) and len(stay):
                    why, whole = f"data.val_share {self.share:g}", found["train"]
                    found = {
                        "train": whole.part(stay, f"{whole.why}; {len(held)} of {len(whole)} are held out ({why})"),
                        "val": whole.part(held, f"held out of data.train ({why}), by their names"),
                    }
            yield {split: images for split, images in found.items() if split in self.splits}


def sources(settings: Settings) -> list[Source]:
    """What the settings name as images; none where they name files alone.

    Raises:
        UserError: there is no such folder or dataset.
    """
    given, found = settings.data, []
    wanted = [("train", ("train", "val") if given.val is None else ("train",)), ("val", ("val",))]
    for name, splits in wanted:
        spec = getattr(given, name)
        if not is_given(spec):
            continue
        masks = settings.task == "segmentation"
        side = given.max_side and max(given.max_side, *pair(given.image_size or 1))
        share = given.val_share if splits == ("train", "val") else 0.0
        try:
            how = (FORM, stamp(spec), splits, share, masks, None if masks else side)
        except (ValueError, OSError) as error:
            raise UserError(f"data.{name} {error}") from error
        key = hashlib.sha256(repr(how).encode()).hexdigest()[:16]
        stem = re.sub(r"[^\w.-]+", "-", spec.removeprefix(HUB).rstrip("/").rpartition("/")[2]) or "images"
        folder = cache_of(settings) / f"{stem}-{key}"
        found.append(Source(f"data.{name}", spec, splits, share, masks, how[-1], folder))
    return found


def cache_of(settings: Settings) -> Path:
    """The folder of the cache."""
    return Path(settings.data.cache or cache_folder() / "images").absolute()


def inspect_data(settings: Settings) -> Infos:
    """What data.train and data.val hold; of images that are not written yet, what their files will hold.

    Raises:
        UserError: the settings name no training images.
        ValueError, OSError: a file is not there or damaged.
    """
    given = settings.data
    if given.train is None:
        raise UserError("data.train: which images to train on is missing; give a folder of images with --data.train "
                        "FOLDER, or a file that python -m data.write FOLDER FILE.beton makes")  # fmt: skip
    infos = {}
    for split in ("train", "val"):
        spec = getattr(given, split)
        if spec is not None and not is_given(spec):
            infos[split] = data.inspect(data.resolve(spec, split))
    written = settings.files
    for source in sources(settings) if written is None else ():
        if source.is_written:
            infos |= {split: data.inspect(path) for split, path in source.files().items()}
            continue
        with source.opened() as found:
            infos |= {split: images.expected(source.folder / f"{split}.beton") for split, images in found.items()}
    infos |= {split: data.inspect(path) for split, path in (written or {}).items()}
    return {split: infos[split] for split in ("train", "val") if split in infos}


def notes(settings: Settings) -> list[str]:
    """What a dry run says of images that are not written yet, a line each."""
    lines = []
    for source in sources(settings):
        if not source.is_written:
            with source.opened() as found:
                lines += [
                    f"{source.setting} {source.spec}: {len(images)} images ({images.why}) would be written to "
                    f"{source.folder / split}.beton"
                    for split, images in found.items()
                ]
    return lines


def write_missing(found: list[Source]) -> dict[str, Path]:
    """The files of images, by their splits, written where the cache does not have them; for one rank.

    Args:
        found: what `sources` gave.

    Raises:
        UserError: one line on what does not fit, or cannot be written.
    """
    files = {}
    for source in found:
        try:
            _write(source)
        except OSError as error:
            raise UserError(f"data.cache {source.folder.parent}: cannot be written ({cause(error)}); or give another "
                            "folder with --data.cache FOLDER") from error  # fmt: skip
        except RuntimeError as error:  # a process of the writer's
            raise UserError(f"{source.setting} {source.spec}: {error}") from error
        for split, path in source.files().items():
            print(f"data.{split}: {path}", file=sys.stderr, flush=True)
            files[split] = path
    return files


def _is_whole(source: Source) -> bool:
    written = [side.with_suffix("") for side in source.folder.glob("*.beton.json")]
    try:
        return bool([data.inspect(path) for path in written])
    except (ValueError, FileNotFoundError):
        return False


def _write(source: Source) -> None:
    """Write a source's folder, unless it is there, or another process is at it: then wait for that."""
    if source.is_written and _is_whole(source):
        return
    cache = source.folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    locks = cache / ".locks" / source.folder.name
    locks.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(locks, 0)
    except BlockingIOError:
        print(f"{source.spec}: another process is writing it to {source.folder}; waiting", file=sys.stderr, flush=True)
        lock = hold(locks)
    with lock:
        if source.is_written and _is_whole(source):
            return
        mine = f".{source.folder.name}.{socket.gethostname()}"
        for left in cache.glob(f"{glob.escape(mine)}.*"):  # of a process that was killed
            if left.suffix[1:].isdigit() and not psutil.pid_exists(int(left.suffix[1:])):
                shutil.rmtree(left, ignore_errors=True)
        aside = cache / f"{mine}.{os.getpid()}"
        try:
            aside.mkdir(exist_ok=True)
            with source.opened(aside) as found:
                for split, images in found.items():
                    said = f"{source.setting} {source.spec}: {len(images)} images, {images.why}"
                    print(f"{said}; writing {source.folder / split}.beton", file=sys.stderr, flush=True)
                    write(
                        images.dataset, aside / f"{split}.beton", max_side=source.max_side, skip_unreadable=True,
                        source=source.spec, allow_empty=split == "val", **images.how(),
                    )  # fmt: skip
            if source.is_written and not _is_whole(source):  # damaged
                shutil.rmtree(source.folder)
            if not source.is_written:  # as another may have done where the file system has no locks
                os.replace(aside, source.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
