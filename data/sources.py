"""Where images come from: folders as they lie on disk, and any image as RGB pixels."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# What Pillow may take a file for, whatever its name says: others of its formats start programs (EPS: Ghostscript).
Image.init()
_FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
            if name in Image.OPEN]  # fmt: skip
MAX_SIDE = 65535  # FFCV stores sides in 16 bits


class ImageFolder:
    """The images under a folder: a class a subfolder (`root/class/image.jpg`, classes sorted by name), or unlabelled.

    Links to files and to folders are followed, wherever they lead: such folders are often made of them.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, classes without images, or a link that leads back to a folder above it.

    Attributes:
        classes: names of the classes, or None when unlabelled.
        why: how the choice was made, for the screen.
    """

    def __init__(self, root: str | Path, unlabelled: bool = False):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder; give a folder of images")
        self.files = image_files(self.root)
        if not self.files:
            raise ValueError(f"{self.root}: holds no images ({' '.join(IMAGE_SUFFIXES)})")
        depths = {len(file.parts) for file in self.files}
        folders = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")
        self.classes: list[str] | None = None
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
            self.classes = folders
            empty = sorted(set(folders) - {file.parts[0] for file in self.files})
            if empty:
                names = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
                mend = "remove them, or pass --unlabelled"
                raise ValueError(f"{self.root}: class folders without images: {names}; {mend}")
        self._labels = {name: label for label, name in enumerate(self.classes or ())}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        """(image,) or (image, label); raises what `read_image` does."""
        pixels = read_image(self.root / self.files[index])
        return (pixels, self._labels[self.files[index].parts[0]]) if self.classes else (pixels,)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])


def read_image(path: Path) -> np.ndarray:
    """The pixels of an image file: uint8 [H, W, 3], see `to_rgb`.

    Raises:
        ValueError, OSError, Image.DecompressionBombError: see `open_image`.
    """
    with open_image(path) as image:
        return to_rgb(image)


def open_image(path: Path) -> Image.Image:
    """An image file, to be used as a context.

    Raises:
        ValueError, OSError, Image.DecompressionBombError: it cannot be read, or has more than twice
            `Image.MAX_IMAGE_PIXELS`.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("is no regular file, or a link that leads nowhere")
    return Image.open(path, formats=_FORMATS)


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """Any 8- or 16-bit image -> uint8 [H, W, 3], turned upright as its EXIF orientation says; alpha is dropped.

    Raises:
        ValueError, OSError: the pixels cannot be decoded or have no fixed range.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        return image
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image must be a PIL image or a uint8 array, not {type(image).__name__}")
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"a side of {max(image.size)} pixels is above {MAX_SIDE}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def image_files(root: Path) -> list[Path]:
    """Paths of the images under a folder, relative to it and sorted; hidden files and folders are passed over."""
    found = []
    chains = {str(root): (root.resolve(),)}  # where a folder really lies, after those that led to it
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        chain = chains.pop(folder)
        for name in folders:
            path = os.path.join(folder, name)
            place = Path(path).resolve() if os.path.islink(path) else chain[-1] / name
            if any(above.is_relative_to(place) for above in chain):
                raise ValueError(f"{path}: leads back to a folder that it lies in; remove the link")
            chains[path] = (*chain, place)
        inside = Path(folder).relative_to(root)
        found += [
            inside / name
            for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return found
