"""Images with a mask of labels each: ADE20K, Cityscapes and Pascal VOC as distributed, or any pair of folders.

What a value in a mask's file means says a class table, a CSV of lines `value,name,red,green,blue`: the line's class is
the next one, in the table's order from 0 on; a line without a name is ignored, and so is 255 where no line has it. The
colours are for pictures; a table may go without. Those of the data sets lie in `data/classes/`.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.decode import IGNORE
from data.sources import IMAGE_SUFFIXES, image_files, open_image, read_image

TABLES = Path(__file__).parent / "classes"
_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "PPM", "TGA")  # Pillow's names of formats that keep labels as they are
_LOSSY = (".avif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".webp")


@dataclass(frozen=True)
class ClassTable:
    """What the values in masks mean.

    Attributes:
        names: of the classes.
        palette: (R, G, B) of each class, in 0..255.
        classes: int16 [65536], the class of each value in a file; `IGNORE`, or -1 where the table does not have it.
    """

    names: list[str]
    palette: list[list[int]]
    classes: np.ndarray

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Values as in a file, integers [H, W] -> classes, uint8 [H, W].

        Raises:
            ValueError: a value is not in the table.
        """
        inside = (labels >= 0) & (labels < len(self.classes))
        classes = self.classes[labels if inside.all() else np.where(inside, labels, 0)]
        unknown = ~inside | (classes < 0)
        if unknown.any():
            values = np.unique(labels[unknown])
            shown = ", ".join(map(str, values[:5])) + (" and others" if len(values) > 5 else "")
            raise ValueError(f"has label {shown}, which is not in the class table")
        return classes.astype(np.uint8)


def read_table(path: str | Path) -> ClassTable:
    """A class table from a CSV, see the module.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such table, has a value or a name twice, or more than 255 classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such class table; give a CSV of lines value,name,red,green,blue")
    names, colours, classes = [], [], np.full(1 << 16, -1, np.int16)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a CSV ({error})") from error
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and row[0] == "value"):
            continue
        try:
            value, name, colour = int(row[0]), row[1].strip(), [int(part) for part in row[2:] if part.strip()]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: line {number} is not value,name,red,green,blue") from error
        if not 0 <= value < len(classes) or len(colour) not in (0, 3) or not all(0 <= part <= 255 for part in colour):
            raise ValueError(f"{path}: line {number} has a value outside 0..65535, or no colour in 0..255")
        if classes[value] != -1 or (name and name in names):
            raise ValueError(f"{path}: line {number} has a value or a name that an earlier line has")
        classes[value] = len(names) if name else IGNORE
        if name:
            names.append(name)
            colours.append(colour)
    if not 0 < len(names) <= IGNORE:
        raise ValueError(f"{path}: has {len(names)} classes; a table must have 1 to {IGNORE}")
    if classes[IGNORE] == -1:
        classes[IGNORE] = IGNORE
    usual = default_palette(len(names))
    return ClassTable(names, [given or other for given, other in zip(colours, usual, strict=True)], classes)


def default_palette(count: int) -> list[list[int]]:
    """Pascal VOC's colours of `count` classes: a class number's bits, dealt to R, G and B from the highest on."""
    palette = []
    for number in range(count):
        bits = [[(number >> (3 * place + channel)) & 1 for place in range(8)] for channel in range(3)]
        palette.append([sum(bit << (7 - place) for place, bit in enumerate(channel)) for channel in bits])
    return palette


class Pairs:
    """Images with masks; as a dataset for `data.write`: items are {"image": uint8 [H, W, 3], "mask": uint8 [H, W]}.

    Attributes:
        mask_classes, palette: of the class table.
        why: what was taken for what, for the screen.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], table: ClassTable, why: str):
        self.pairs, self.table, self.why = pairs, table, why
        self.mask_classes, self.palette = table.names, table.palette

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, mask = self.pairs[index]
        pixels = read_image(image)
        try:
            labels = read_labels(mask)
            if labels.shape != pixels.shape[:2]:
                sizes = (" x ".join(map(str, shape)) for shape in (labels.shape[::-1], pixels.shape[1::-1]))
                raise ValueError("is {} pixels, the image {}".format(*sizes))
            return {"image": pixels, "mask": self.table.of(labels)}
        except (OSError, ValueError) as error:
            raise ValueError(f"its mask {mask} {error}") from error

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])


def read_labels(path: Path) -> np.ndarray:
    """The values in a mask's file: integers [H, W]; of an image with a palette its indices, not its colours.

    Raises:
        ValueError, OSError: it cannot be read, or is stored with loss, or in colours.
    """
    with open_image(path) as image:
        if image.format not in _LOSSLESS or image.info.get("compression") == "jpeg":
            raise ValueError(f"is stored as {image.format}, which changes labels; store masks as PNG")
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise ValueError(f"is of colours ({image.mode}), not of labels")
        labels = np.asarray(image)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


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
    root = Path(root)
    for folder in (root, *([masks] if masks else [])):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give a folder of images, or an unpacked data set")
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
        pairs = pair(root, Path(masks))
        return Pairs(pairs, read_table(classes), f"with masks from {masks}, classes from {classes}")
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
        files = [file for file in image_files(folder) if file.stem.endswith(end)]
        found.append({str(file.with_suffix(""))[: len(str(file.with_suffix(""))) - len(end)]: file for file in files})
        if len(found[-1]) != len(files):
            raise ValueError(f"{folder}: has two files of one name with other suffixes; remove one of each two")
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
