"""Data sets as they are distributed, unpacked: CIFAR-10 and -100, CIFAR-10-C, Flowers-102, Oxford-IIIT Pets, DomainNet.

A list in a data set cannot name a file outside its folder, and CIFAR's pickles are read without running anything.
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.corrupt import SEVERITIES
from data.images import read_image
from data.paths import existing_folder
from data.sources import ImageFolder

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Files:
    """Image files with labels; as a dataset for `data.write`.

    Attributes:
        classes: names of the classes, or None when the data set gives none.
        why: what was taken for what, for the screen.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int], classes: list[str] | None, why: str):
        self.root, self.files, self.labels, self.classes, self.why = root, files, labels, classes, why

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return read_image(self.root / self.files[index]), self.labels[index]

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])


class Arrays:
    """Images uint8 [n, H, W, 3] with labels [n]; as a dataset for `data.write`.

    Attributes:
        classes, why: as of `Files`.
        corrupted: whether the images are already corrupted, as CIFAR-10-C's.
    """

    corrupted = False

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: list[str] | None, why: str):
        self.images, self.labels, self.classes, self.why = images, labels, classes, why

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.ascontiguousarray(self.images[index]), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"image {index}"


def open_source(
    root: str | Path,
    layout: str | None = None,
    split: str | None = None,
    corruption: tuple[str, int] | None = None,
    unlabelled: bool = False,
) -> Files | Arrays | ImageFolder:
    """A folder as a dataset for `data.write`.

    Args:
        root: the unpacked data set, as it was distributed; of DomainNet the folder of one domain, beside its lists.
        layout: a key of `LAYOUTS`, or "folder" for one subfolder per class; by default what the files in it say.
        split: one of the layout's; by default its first.
        corruption: (name, severity), of CIFAR-10-C alone: which images of it.
        unlabelled: of a folder of images alone: take no labels from subfolders.

    Raises:
        FileNotFoundError: no such folder, or a file of the layout is missing.
        ValueError: no such layout or split, or a file in it is damaged or leads outside the folder.
    """
    root = existing_folder(root, "give a folder of images, or an unpacked data set")
    if layout not in (None, "folder", *LAYOUTS):
        raise ValueError(f"layout {layout!r}: must be folder, {', '.join(LAYOUTS)}")
    found = layout or next((name for name, (marks, _, _) in LAYOUTS.items() if marks(root)), "folder")
    if found == "folder":
        if split is not None:
            raise ValueError(
                f"split {split}: {root} is a folder of images, without splits; name the split's own folder"
            )
        return ImageFolder(root, unlabelled)
    if unlabelled:
        raise ValueError(
            f"unlabelled: {root} is {found}, whose labels are known; take it as images with --layout folder"
        )
    _, splits, read = LAYOUTS[found]
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"split {split!r}: {found} has only {' and '.join(splits)}")
    try:
        if found == "cifar10c":
            return _cifar10c(root, corruption)
        dataset = read(root, split)
    except FileNotFoundError as error:
        said = f"{error.filename}: no such file, which {found} has as it is distributed; unpack it whole"
        raise FileNotFoundError(said) from error
    except KeyError as error:
        raise ValueError(
            f"{root}: not {found} as it is distributed, without {error}; choose another --layout"
        ) from error
    dataset.why = f"{found}, its {split} split"
    return dataset


def _cifar(root: Path, split: str) -> Arrays:
    """CIFAR-10 or CIFAR-100, as Python pickles or binary."""
    root = _cifar_folder(root)
    hundred = not (root / "batches.meta").exists() and not (root / "batches.meta.txt").exists()
    binary = (root / "batches.meta.txt").exists() or (root / "fine_label_names.txt").exists()
    if hundred:
        names = [split]
    else:
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    if binary:
        labels_before = 2 if hundred else 1  # coarse and fine, or one
        parts = [_read_binary(root / f"{name}.bin", labels_before) for name in names]
        listed = (root / ("fine_label_names.txt" if hundred else "batches.meta.txt")).read_text().split()
    else:
        key = "fine_labels" if hundred else "labels"
        parts = [_read_pickled(root / name, key) for name in names]
        meta = _unpickle(root / ("meta" if hundred else "batches.meta"))
        listed = [str(name) for name in meta["fine_label_names" if hundred else "label_names"]]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    if labels.max() >= len(listed):
        raise ValueError(f"{root}: has label {labels.max()}, but only {len(listed)} names of classes; get it again")
    return Arrays(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, listed, "")


def _cifar_folder(root: Path) -> Path:
    inside = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
    marks = ("batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt")
    for name in inside:
        if any((root / name / mark).is_file() for mark in marks) and any(
            (root / name / first).is_file() for first in ("test_batch", "test_batch.bin", "test", "test.bin")
        ):
            return root / name
    raise KeyError("batches.meta")


def _is_cifar(root: Path) -> bool:
    try:
        return bool(_cifar_folder(root))
    except KeyError:
        return False


def _read_binary(path: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 3072] and the last of the labels before each image."""
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (labels + 3072):
        raise ValueError(f"{path}: truncated, {len(content)} bytes are no whole number of images; get it again")
    rows = content.reshape(-1, labels + 3072)
    return rows[:, labels:], rows[:, labels - 1].astype(np.int64)


def _read_pickled(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(path)
    images, labels = batch["data"], batch[key]
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape != (len(labels), 3072):
        raise ValueError(f"{path}: damaged, its data is not [{len(labels)}, 3072]; get it again")
    if not all(isinstance(label, int) and 0 <= label < 100 for label in labels):
        raise ValueError(f"{path}: damaged, its {key} are not numbers of classes; get it again")
    return images, np.array(labels, np.int64)


class _Array:
    """What a pickled numpy array says of itself: (version, shape, dtype, Fortran order, bytes)."""

    state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _Type:
    """What a pickled numpy dtype says of itself."""

    def __init__(self, name: Any = "", *_: Any):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Plain values, and arrays as `_Array`: no name in a file leads to code of another module, numpy's included."""

    _NAMES = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
              "numpy.ndarray", "numpy.dtype", "_codecs.encode")  # fmt: skip

    def find_class(self, module: str, name: str) -> Callable:
        full = f"{module}.{name}"
        if full not in self._NAMES:
            raise pickle.UnpicklingError(f"it asks for {full}, which is not run")
        if name == "encode":  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: str(text).encode("latin1")
        return {"_reconstruct": lambda *_: _Array(), "ndarray": _Array, "dtype": _Type}[name]


def _unpickle(path: Path) -> dict[str, Any]:
    """The dict in one of CIFAR's pickles, keys as str, arrays of uint8."""
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {_text(key): _value(value) for key, value in content.items()}
    except OSError:
        raise
    except Exception as error:  # a pickle may fail in any way
        raise ValueError(
            f"{path}: cannot be read as a batch of CIFAR ({' '.join(str(error).split())[:200]})"
        ) from error


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(item) if isinstance(item, bytes) else item for item in value]
    if not isinstance(value, _Array):
        return value
    _, shape, kind, fortran, data = value.state
    if _text(kind.name) not in ("u1", "|u1", "uint8") or fortran:
        raise ValueError("its array is not of uint8 in C order")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _cifar10c(root: Path, corruption: tuple[str, int] | None) -> Arrays:
    """CIFAR-10-C: `NAME.npy` holds the test set at severity 1, then 2, to 5; `labels.npy` its labels."""
    names = sorted(path.stem for path in root.glob("*.npy") if path.stem != "labels")
    if corruption is None or corruption[0] not in names or corruption[1] not in SEVERITIES:
        which = f"say which with --corrupt NAME --severity 1..5, of {', '.join(names)}"
        raise ValueError(f"{root}: CIFAR-10-C holds many test sets; {which}")
    images, labels = _npy(root / f"{corruption[0]}.npy"), _npy(root / "labels.npy")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) % 5:
        raise ValueError(f"{root / corruption[0]}.npy: not CIFAR-10-C, of {images.dtype} {list(images.shape)}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{root}/labels.npy: not the labels of {corruption[0]}.npy")
    each = len(images) // 5
    rows = slice((corruption[1] - 1) * each, corruption[1] * each)
    dataset = Arrays(
        images[rows], labels[rows], list(CIFAR10), f"cifar10c, {corruption[0]} at severity {corruption[1]}"
    )
    dataset.corrupted = True
    return dataset


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a file of numpy's, or damaged ({error}); get it again") from error


def _flowers102(root: Path, split: str) -> Files:
    """Flowers-102: `jpg/image_00001.jpg`, `imagelabels.mat` and `setid.mat`, which count from 1."""
    from scipy.io import loadmat  # slow to import

    def read(file: str, key: str) -> np.ndarray:
        try:
            with open(root / file, "rb") as opened:
                return loadmat(opened, variable_names=[key])[key].reshape(-1).astype(np.int64)
        except (OSError, KeyError):
            raise
        except Exception as error:
            raise ValueError(f"{root / file}: cannot be read as a MATLAB file ({error}); get it again") from error

    labels = read("imagelabels.mat", "labels")
    chosen = read("setid.mat", {"train": "trnid", "val": "valid", "test": "tstid"}[split])
    if labels.min() < 1 or chosen.min() < 1 or chosen.max() > len(labels):
        raise ValueError(f"{root}/setid.mat: does not fit imagelabels.mat; get both again")
    return Files(root, [f"jpg/image_{i:05d}.jpg" for i in chosen], (labels[chosen - 1] - 1).tolist(), None, "")


def _pets(root: Path, split: str) -> Files:
    """Oxford-IIIT Pets: lines `NAME CLASS SPECIES BREED` in annotations/, classes from 1, named by their images."""
    path = root / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    files, labels = _read_list(path, root, lambda name: f"images/{name}.jpg", first=1)
    names = {label: file[len("images/") :].rsplit("_", 1)[0] for file, label in zip(files, labels, strict=True)}
    return Files(root, files, labels, _named(names), "")


def _domainnet(root: Path, split: str) -> Files:
    """One domain of DomainNet: `sketch/` beside `sketch_train.txt` and `sketch_test.txt`, of lines `PATH CLASS`."""
    files, labels = _read_list(root.parent / f"{root.name}_{split}.txt", root.parent, str)
    names = {label: PurePosixPath(file).parent.name for file, label in zip(files, labels, strict=True)}
    return Files(root.parent, files, labels, _named(names), "")


def _read_list(path: Path, root: Path, file_of: Callable[[str], str], first: int = 0) -> tuple[list[str], list[int]]:
    """Files under `root` and their labels, from lines of a name and a class that is counted from `first`."""
    files, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, label = line.split()[:2]
            file, label = file_of(name), int(label) - first
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not a name and a class; get it again") from error
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"{path}: line {number} leads outside {root}; such a list is not followed")
        if label < 0:
            raise ValueError(f"{path}: line {number} has a class below {first}; get it again")
        files.append(file)
        labels.append(label)
    if not files:
        raise ValueError(f"{path}: lists no images; get it again")
    return files, labels


def _named(names: dict[int, str]) -> list[str] | None:
    """Names in the order of the classes; None where one has none."""
    return [names[label] for label in range(len(names))] if names.keys() == set(range(len(names))) else None


# name -> (whether a folder is one, its splits, (folder, split) -> dataset)
LAYOUTS: dict[str, tuple[Callable[[Path], bool], tuple[str, ...], Callable]] = {
    "cifar": (_is_cifar, ("train", "test"), _cifar),
    "cifar10c": (lambda root: (root / "labels.npy").is_file(), ("test",), _cifar10c),
    "flowers102": (lambda root: (root / "setid.mat").is_file(), ("train", "val", "test"), _flowers102),
    "pets": (lambda root: (root / "annotations" / "trainval.txt").is_file(), ("train", "test"), _pets),
    "domainnet": (lambda root: (root.parent / f"{root.name}_train.txt").is_file(), ("train", "test"), _domainnet),
}
