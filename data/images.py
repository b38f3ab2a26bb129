"""Any image as RGB pixels: 8 bits per channel, turned upright. And its mask, turned with it.

An image of more than 8 bits per channel is refused: how its values become 8 bits is the user's choice. Pillow would cut
or clip them without a word. Alpha is dropped: the colour that is stored under it is taken. Of an animation the first
frame is taken.

A mask follows its image by one rule. A mask with an orientation of its own is turned by that. Of any other the size
tells whether it was drawn on the stored pixels of its image, so that it is turned as the image is, or on upright ones.
Where the size does not tell, it belongs to the stored pixels.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

# What Pillow may take a file for, whatever its name says: others of its formats start programs (EPS: Ghostscript).
Image.init()
_FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
            if name in Image.OPEN]  # fmt: skip
_RECOGNISABLE = [name for name in _FORMATS if name != "TGA"]  # whose files begin with a mark
_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "PPM", "TGA")  # Pillow's names of formats that keep labels as they are
MAX_SIDE = 65535  # FFCV stores sides in 16 bits
_HEADER = 1 << 16  # bytes of a file in which its bit depth is looked for
# How Pillow unpacks one channel without a change of its values.
_EXACT = ("1", "L", "P", "P;1", "P;2", "P;4", "I;16", "I;16L", "I;16B", "I;16N", "I;32", "I;32L", "I;32B", "I;32N")
_STORE_8 = "store it with 8 bits per channel, scaled as you mean it"


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of an image file: uint8 [H, W, 3], see `to_rgb`.

    Raises:
        ValueError, OSError, Image.DecompressionBombError: see `open_image` and `to_rgb`.
    """
    return read_turned(path)[0]


def read_turned(path: str | Path) -> tuple[np.ndarray, int]:
    """`read_image`, and the orientation that the pixels were turned by, see `to_upright`."""
    with open_image(path) as image:
        return to_upright(image)


def open_image(path: str | Path) -> Image.Image:
    """An image file, to be used as a context. It is known by its content, not by its suffix.

    Raises:
        ValueError, OSError, Image.DecompressionBombError: it cannot be read, or has more than twice
            `Image.MAX_IMAGE_PIXELS`.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("is no regular file, or a link that leads nowhere")
    return Image.open(path, formats=_FORMATS)


def is_image(path: Path) -> bool:
    """Whether a file's content begins as an image's."""
    if not path.is_file():
        return False
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_RECOGNISABLE):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # a reader of any bytes may trip over anything
        return False


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """Any image of 8 bits per channel -> uint8 [H, W, 3], turned upright as its EXIF orientation says, without alpha.

    Raises:
        ValueError, OSError: the pixels cannot be decoded, or have more than 8 bits, or an array is not of that kind.
    """
    return to_upright(image)[0]


def to_upright(image: Image.Image | np.ndarray) -> tuple[np.ndarray, int]:
    """`to_rgb`, and the EXIF orientation (1 to 8) that the stored pixels were turned by: 1 for an array."""
    if isinstance(image, np.ndarray):
        return _check_array(image), 1
    if not isinstance(image, Image.Image):
        mend = "; give image.permute(1, 2, 0).numpy() as uint8" if hasattr(image, "permute") else ""
        raise ValueError(f"an image must be a PIL image or a uint8 array, not {type(image).__name__}{mend}")
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"a side of {max(image.size)} pixels is above {MAX_SIDE}")
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"holds {image.n_frames} pages; store each page as a file")
    _check_depth(image)
    orientation = _orientation(image)
    pixels = np.asarray(image.convert("RGB"))
    return turn(pixels, _orientation(image)), orientation  # Pillow turns a TIFF itself when it decodes it


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [H, W, ...] -> upright ones, by an EXIF orientation, 1 to 8 (Exif 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def turn_mask(mask: np.ndarray, own: int, orientation: int, size: tuple[int, int], upright: bool = False) -> np.ndarray:
    """A mask as it belongs to its upright image, by the rule of this module.

    Args:
        mask: integers [H, W], as they are stored.
        own: EXIF orientation of the mask itself; 1 for none.
        orientation: EXIF orientation that its image was turned by.
        size: (height, width) of the upright image.
        upright: what to take where the size does not tell: whether other masks show that they were drawn upright.
    """
    if own != 1:
        return turn(mask, own)
    if orientation >= 5 and size[0] != size[1]:
        upright = mask.shape == size
    return mask if upright else turn(mask, orientation)


def drawn_on(image: Path, mask: Path) -> str | None:
    """What the sizes of a mask and of its turned image tell: drawn on "stored" or on "upright" pixels, or "either".

    None for a pair that is not in question: without an orientation, or with one of the mask's own, or not readable.
    """
    try:
        with open_image(image) as opened:
            orientation, size = _orientation(opened), opened.size
            if orientation == 1 or opened.format == "TIFF":  # whose size Pillow may have turned
                return None
        with open_image(mask) as opened:
            own, its_size = _orientation(opened), opened.size
    except Exception:  # it is named when it is read
        return None
    if own != 1:
        return None
    if orientation < 5 or size[0] == size[1]:
        return "either"
    return {size: "stored", size[::-1]: "upright"}.get(its_size)


def read_labels(path: str | Path) -> tuple[np.ndarray, int]:
    """The values in a mask's file, integers [H, W], and the orientation of its own, see `to_labels`.

    Raises:
        ValueError, OSError: it cannot be read, or is stored with loss, or in colours, or with other values than meant.
    """
    with open_image(path) as image:
        if image.format not in _LOSSLESS or image.info.get("compression") == "jpeg":
            raise ValueError(f"is stored as {image.format}, which changes labels; store masks as PNG")
        return to_labels(image)


def to_labels(image: Image.Image) -> tuple[np.ndarray, int]:
    """The values of a mask: integers [H, W], of a palette its indices; and its EXIF orientation, which is not applied.

    Raises:
        ValueError, OSError: it is in colours, or its values do not stay as they are stored when Pillow decodes them.
    """
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"is of colours ({image.mode}), not of labels")
    codec, rawmode = _stored_as(image)
    if codec.startswith("ppm") or (rawmode and rawmode not in _EXACT):
        raise ValueError(f"is stored as {rawmode}, whose values Pillow scales; store masks as PNG of 8 bits")
    own = _orientation(image)
    labels = np.asarray(image)
    own = own if _orientation(image) == own else 1  # Pillow has turned a TIFF itself
    return (labels.astype(np.uint8) if labels.dtype == bool else labels), own


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        if max(image.shape) > MAX_SIDE:
            raise ValueError(f"a side of {max(image.shape)} pixels is above {MAX_SIDE}")
        return np.ascontiguousarray(image)
    mend = ""
    if image.dtype != np.uint8:
        mend = "; scale it to 0..255 as you mean it, then .astype(numpy.uint8)"
    elif image.ndim == 2:
        mend = "; repeat a grey image with numpy.stack([image] * 3, axis=2)"
    elif image.ndim == 3 and image.shape[2] == 4:
        mend = "; drop or blend its alpha, such as by image[..., :3]"
    elif image.ndim == 3 and image.shape[0] == 3:
        mend = "; give image.transpose(1, 2, 0)"
    raise ValueError(f"an array image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}{mend}")


def _check_depth(image: Image.Image) -> None:
    """Raises ValueError for more than 8 bits per channel. It looks before Pillow decodes, which hides them."""
    if image.mode == "F":
        raise ValueError(f"floating-point pixels have no fixed range; {_STORE_8}")
    if image.mode == "I" or image.mode.startswith("I;"):
        raise ValueError(f"has more than 8 bits per channel (Pillow's mode {image.mode}); {_STORE_8}")
    codec, rawmode = _stored_as(image)
    bits = 16 if ";16" in rawmode and not rawmode.startswith("BGR") else 8  # BGR;16 is 5 + 6 + 5 bits
    if codec.startswith("ppm") and image.tile[0].args[-1] > 255:
        bits = 16
    elif image.format == "JPEG2000" and codec:
        bits = _jpeg2000_bits(_head(image))
    elif image.format == "AVIF" and codec:
        bits = _avif_bits(_head(image))
    if bits > 8:
        raise ValueError(f"has {bits} bits per channel; {_STORE_8}")


def _stored_as(image: Image.Image) -> tuple[str, str]:
    """Pillow's decoder and raw mode of an image that it has not decoded yet; empty after that."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return "", ""
    codec, args = image.tile[0].codec_name, image.tile[0].args
    rawmode = args[0] if isinstance(args, tuple) and args else args
    return codec, rawmode if isinstance(rawmode, str) else ""


def _head(image: ImageFile.ImageFile) -> bytes:
    at = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(_HEADER)
    image.fp.seek(at)
    return head


def _jpeg2000_bits(head: bytes) -> int:
    """The most bits of a component, by the SIZ marker of the codestream (ISO/IEC 15444-1, A.5.1)."""
    at = head.find(b"\xff\x4f\xff\x51") + 2
    components = head[at + 40 : at + 40 + 3 * int.from_bytes(head[at + 38 : at + 40])] if at > 1 else b""
    return max(((part & 0x7F) + 1 for part in components[::3]), default=8)


def _avif_bits(head: bytes) -> int:
    """By the AV1 codec configuration box (AV1-ISOBMFF 2.3.3)."""
    at = head.find(b"av1C")
    flags = head[at + 6] if 0 <= at < len(head) - 6 else 0
    return (12 if flags & 0x20 else 10) if flags & 0x40 else 8


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. EXIF that cannot be read says nothing of the pixels: 1."""
    try:
        value = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of another's bytes anything may be wrong
        return 1
    return value if 1 <= value <= 8 else 1
