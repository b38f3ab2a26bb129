"""What a path means that a user gives: `~` is the home folder. And what to say of one that leads elsewhere."""

import difflib
import os
from pathlib import Path

# What a file's content begins with, at an offset in bytes, and what to call such a file.
_MARKS = (
    (0, b"\x02\x00", "a .beton file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!", "a rar archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"version https://git-lfs", "a pointer of Git LFS (get the file itself with git lfs pull)"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a file of numpy's"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"SQLite format 3", "an SQLite database"),
)


def expand(path: str | Path) -> Path:
    """A path as a user gives it, with `~` as the home folder. Every path that this package takes goes through here.

    Raises:
        ValueError: `~NAME` of no known user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no such user; give the folder in full") from error


def cache_folder() -> Path:
    """Where files are kept that can be made again: `$XDG_CACHE_HOME/unsoftmax`, else `~/.cache/unsoftmax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unsoftmax"


def existing_folder(path: str | Path, want: str) -> Path:
    """A folder that a user gives.

    Args:
        path: the folder.
        want: how the message ends when there is none, such as "give a folder of images".

    Raises:
        FileNotFoundError: there is no such folder; the message says what is there, or what has nearly that name.
    """
    path = expand(path)
    if path.is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder{did_you_mean(path)}; {want}")
    kind = kind_of(path)
    what = f", but {kind}" if kind else ""
    unpack = "unpack it and " if kind and "archive" in kind else ""
    raise FileNotFoundError(f"{path}: no folder{what}; {unpack}{want}")


def kind_of(path: Path) -> str | None:
    """What a file is by its content, with an article; None for what is not known. Its name does not matter."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    return next((kind for at, mark, kind in _MARKS if head[at : at + len(mark)] == mark), None)


def did_you_mean(path: Path, *others: str) -> str:
    """`; did you mean NEAR?` for a path that is not there; empty where nothing beside it has nearly its name.

    Args:
        path: the path.
        others: names that are as good as one of a file.
    """
    try:
        beside = sorted(name for name in os.listdir(path.parent) if not name.startswith("."))
    except OSError:
        beside = []
    near = [name for name in beside if Path(name).stem == path.stem or name == path.name + ".beton"]
    near += difflib.get_close_matches(path.name, [*beside, *others], n=1)
    if not near:
        return ""
    return f"; did you mean {near[0] if near[0] in others else path.parent / near[0]}?"
