"""Images with a mask of labels each: ADE20K, Cityscapes and Pascal VOC as distributed, or any pair of folders.

A class table says what the values in a mask's file mean, see `data.class_table`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.class_table import TABLES, ClassTable, read_table
from data.images import drawn_on, read_labels, read_turned, turn_mask
from data.paths import existing_folder
from data.sources import IMAGE_SUFFIXES, find_images, refuse_splits

READERS = 8  # threads that look at images' headers
__all__ = ["LAYOUTS", "Pairs", "open_pairs", "pair", "read_table"]

_LOSSY = (".avif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".webp")


class Pairs:
    """Images with masks; as a dataset for `data.write`: items are {"image": uint8 [H, W, 3], "mask": uint8 [H, W]}.

    Attributes:
        mask_classes, palette: of the class table.
        why: what was taken for what, for the screen.
        upright: whether masks were drawn on upright pixels where their size does not tell, see `data.images`.
        passed_over: files and hidden folders under the images' folder that were not taken.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], table: ClassTable, why: str, passed_over: Sequence[Path] = ()
    ):
        self.pairs, self.table, self.why, self.passed_over = pairs, table, why, passed_over
        self.mask_classes, self.palette = table.names, table.palette
        self.upright = _drawn_upright(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, mask = self.pairs[index]
        pixels, orientation = read_turned(image)
        try:
            labels = turn_mask(*read_labels(mask), orientation, pixels.shape[:2], self.upright)
            if labels.shape != pixels.shape[:2]:
                sizes = (" x ".join(map(str, shape)) for shape in (labels.shape[::-1], pixels.shape[1::-1]))
                raise ValueError("is {} pixels, the image {}".format(*sizes))
            return {"image": pixels, "mask": self.table.of(labels)}
        except (OSError, ValueError) as error:
            raise ValueError(f"its mask {mask} {error}") from error

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])


def _drawn_upright(pairs: Sequence[tuple[Path, Path]]) -> bool:
    """Whether masks were drawn on upright pixels, as those tell whose size fits no other. It opens all images.

    Raises:
        ValueError: some masks tell this and some that, and of some the size does not tell.
    """
    found: dict[str | None, list[Path]] = defaultdict(list)
    with ThreadPoolExecutor(READERS) as pool:
        for (image, _), drawn in zip(pairs, pool.map(lambda pair: drawn_on(*pair), pairs), strict=True):
            found[drawn].append(image)
    if found["stored"] and found["upright"] and found["either"]:
        one, other, doubtful = (found[kind][0] for kind in ("stored", "upright", "either"))
        why = f"the mask of {one} was drawn on the stored pixels, that of {other} on pixels turned upright"
        raise ValueError(f"{doubtful}: has an EXIF orientation that its mask may follow or not: {why}; turn the images")
    return bool(found["upright"]) and not found["stored"]


def open_pairs(
    root: str | Path,
    layout: str | None = None,
    split: str | None = None,
    masks: str | Path | None = None,
    classes: str | Path | None = None,
) -> Pairs:
    """A folder of images with masks as a dataset for `data.write`.

    Args:
        root: the unpacked data set, as it was distributed; or any folder of images, with `masks`.
        layout: a key of `LAYOUTS`, or "folder" for a pair of folders; by default what the files in it say.
        split: one of the layout's; by default its first.
        masks: of a pair of folders: the masks, each named as its image but for the suffix.
        classes: the class table; by default the layout's own.

    Raises:
        FileNotFoundError: no such folder, or a file of the layout is missing.
        ValueError: no such layout or split, no class table, or an image or a mask without its partner.
    """
    root = existing_folder(root, "give a folder of images, or an unpacked data set")
    masks = existing_folder(masks, "give the folder of the masks") if masks else None
    if layout not in (None, "folder", *LAYOUTS):
        raise ValueError(f"layout {layout!r}: with masks must be folder, {', '.join(LAYOUTS)}")
    found = layout or (
        "folder" if masks else next((name for name, (of, _, _) in LAYOUTS.items() if of(root)), "folder")
    )
    if (found == "folder") != (masks is not None):
        if masks:
            raise ValueError(f"masks: {root} is {found}, which has its own; leave out --masks")
        raise ValueError(f"{root}: is none of {', '.join(LAYOUTS)}; say where its masks are with --masks FOLDER")
    if found == "folder":
        if split is not None:
            raise ValueError(
                f"split {split}: {root} is a folder of images, without splits; name the split's own folder"
            )
        if classes is None:
            raise ValueError(f"{root}: say what its masks' values mean with --classes TABLE.csv, of lines value,name")
        found = find_images(root)
        refuse_splits(root, found.files)
        pairs, why = pair(root, masks), f"with masks from {masks}, classes from {classes}"
        return Pairs(pairs, read_table(classes), why, found.passed_over)
    _, splits, read = LAYOUTS[found]
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"split {split!r}: {found} has only {' and '.join(splits)}")
    pairs, table = read(root, split)
    return Pairs(pairs, read_table(classes or TABLES / table), f"{found}, its {split} split, with masks")


def pair(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[tuple[Path, Path]]:
    """Images and masks of one name under two folders, but for the suffix and what their names end in; sorted.

    Args:
        images, masks: the folders.
        image_end, mask_end: what comes before the suffix; files with another end are passed over.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no images, one has no mask, a mask has no image, or a mask is stored with loss.
    """
    found = []
    for folder, end in ((images, image_end), (masks, mask_end)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; unpack the data set whole")
        of_name: dict[str, Path] = {}
        for file in find_images(folder, by_content=not end).files:
            stem = file.stem if file.suffix.lower() in IMAGE_SUFFIXES else file.name
            if not stem.endswith(end):
                continue
            name = str(file.parent / stem[: len(stem) - len(end)])
            if name in of_name:
                both = f"{folder / of_name[name]} and {folder / file}"
                raise ValueError(f"{both}: are two files of one name, so which belongs to which? Remove or rename one")
            of_name[name] = file
        found.append(of_name)
    of_images, of_masks = found
    if not of_images:
        raise ValueError(f"{images}: holds no images ({' '.join(IMAGE_SUFFIXES)})")
    lossy = next((file for file in of_masks.values() if file.suffix.lower() in _LOSSY), None)
    if lossy is not None:
        raise ValueError(
            f"{masks / lossy}: a mask stored as {lossy.suffix[1:].upper()}, which changes labels; store masks as PNG"
        )
    for these, others, what, where in ((of_images, of_masks, "mask", masks), (of_masks, of_images, "image", images)):
        alone = sorted(these.keys() - others.keys())
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            folder = images if these is of_images else masks
            raise ValueError(f"{folder / these[alone[0]]}{more}: has no {what} in {where}; add or remove what is alone")
    return [(images / file, masks / of_masks[name]) for name, file in sorted(of_images.items())]


def _inside(root: Path, *names: str) -> Path:
    """The first of the folders `names` in a folder that is there, else the folder itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def _ade20k(root: Path, split: str) -> tuple[list[tuple[Path, Path]], str]:
    """ADE20K's scene parsing benchmark: `images/training/X.jpg` and `annotations/training/X.png`, 0 not labelled."""
    root, folder = _inside(root, "ADEChallengeData2016"), {"train": "training", "val": "validation"}[split]
    return pair(root / "images" / folder, root / "annotations" / folder), "ade20k.csv"


def _cityscapes(root: Path, split: str) -> tuple[list[tuple[Path, Path]], str]:
    """Cityscapes: `leftImg8bit/train/CITY/X_leftImg8bit.png` and `gtFine/train/CITY/X_gtFine_labelIds.png`.

    Where there are no labelIds, labelTrainIds, as its own scripts make them.
    """
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    kind, table = "labelIds", "cityscapes.csv"
    if not any(masks.glob("*/*_gtFine_labelIds.png")) and any(masks.glob("*/*_gtFine_labelTrainIds.png")):
        kind, table = "labelTrainIds", "cityscapes_train_ids.csv"
    return pair(images, masks, "_leftImg8bit", f"_gtFine_{kind}"), table


def _voc(root: Path, split: str) -> tuple[list[tuple[Path, Path]], str]:
    """Pascal VOC: `JPEGImages/X.jpg`, `SegmentationClass/X.png`, for each X in `ImageSets/Segmentation/train.txt`."""
    root = _inside(root, "VOCdevkit/VOC2012", "VOC2012")
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, which voc has as it is distributed; unpack it whole")
    pairs = []
    for number, name in enumerate(path.read_text(encoding="utf-8").split(), 1):
        if name != Path(name).name:
            raise ValueError(f"{path}: line {number} leads outside {root}; such a list is not followed")
        files = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise ValueError(f"{missing}: no such file, which line {number} of {path} names; get it again")
        pairs.append(files)
    if not pairs:
        raise ValueError(f"{path}: lists no images; get it again")
    return pairs, "voc.csv"


# name -> (whether a folder is one, its splits, (folder, split) -> pairs and the class table's file)
LAYOUTS: dict[str, tuple[Callable[[Path], bool], tuple[str, ...], Callable]] = {
    "ade20k": (lambda root: (_inside(root, "ADEChallengeData2016") / "annotations" / "training").is_dir(),
               ("train", "val"), _ade20k),
    "cityscapes": (lambda root: (root / "leftImg8bit").is_dir(), ("train", "val"), _cityscapes),
    "voc": (lambda root: (_inside(root, "VOCdevkit/VOC2012", "VOC2012") / "SegmentationClass").is_dir(),
            ("train", "val"), _voc),
}  # fmt: skip
