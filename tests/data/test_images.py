"""Images: every kind becomes RGB or is refused, and stays with its mask."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images import is_image, read_image, read_labels, to_rgb, turn, turn_mask
from data.sources import ImageFolder
from data.write import write
from tests.support.pictures import picture


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    kinds = {
        "rgba.png": rgb.convert("RGBA"), "gray.png": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"),
        "palette.gif": rgb.convert("P"), "bit.png": rgb.convert("1"), "turned.jpg": rgb,
    }  # fmt: skip
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"exif": exif} if name == "turned.jpg" else {}))
    dataset = ImageFolder(tmp_path)
    pixels = {dataset.files[index].name: dataset[index][0] for index in range(len(dataset))}
    assert pixels.keys() == kinds.keys()
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in pixels.values())
    assert np.array_equal(pixels["rgba.png"], rgb)
    assert pixels["turned.jpg"].shape == (20, 16, 3)


def test_hostile_files_are_named(tmp_path):
    """A pipe, a link to nothing, a bomb of a size that only the header claims, and a program in PostScript."""
    picture(0).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "nothing")
    bomb = bytearray((tmp_path / "0.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "3.png").write_bytes(bomb)
    (tmp_path / "4.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(tmp_path / "4.png") as image:
        assert image.format == "EPS"  # which would be handed to Ghostscript
    side = write(ImageFolder(tmp_path), tmp_path / "x.beton", skip_unreadable=True, progress=False)
    skipped = {Path(entry["name"]).name: entry["reason"] for entry in side["skipped"]}
    assert side["count"] == 1 and skipped.keys() == {"1.png", "2.png", "3.png", "4.png"}
    assert "no regular file" in skipped["1.png"] and "leads nowhere" in skipped["2.png"]
    assert "exceeds limit" in skipped["3.png"] and "cannot identify image file" in skipped["4.png"]


def test_more_than_8_bits_are_refused(tmp_path):
    """Pillow would clip grey ones at 255, and take the high byte of colours."""
    deep = np.random.default_rng(0).integers(0, 65536, (64, 48, 3)).astype(np.uint16)
    for name in ("rgb.png", "rgb.tif", "rgb.ppm", "rgb.jp2", "gray.png", "gray.tif", "gray.jp2", "gray.pgm"):
        assert cv2.imwrite(str(tmp_path / name), deep[..., 0] if name.startswith("gray") else deep)
        with pytest.raises(ValueError, match=r"bits per channel.*store it with 8 bits per channel"):
            read_image(tmp_path / name)
    cv2.imwrite(str(tmp_path / "rgba.png"), np.dstack([deep, deep[..., :1]]))
    with Image.open(tmp_path / "rgba.png") as lazy, pytest.raises(ValueError, match="has 16 bits per channel"):
        to_rgb(lazy)
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="store it with 8 bits per channel"):
            to_rgb(Image.fromarray(np.zeros((4, 4), kind)))
    for name in ("rgb.png", "rgb.tif", "rgb.ppm"):  # and of 8 bits they are read
        cv2.imwrite(str(tmp_path / name), (deep >> 8).astype(np.uint8))
        assert np.array_equal(read_image(tmp_path / name), (deep >> 8)[..., ::-1])
    cv2.imwrite(str(tmp_path / "rgb.jp2"), (deep >> 8).astype(np.uint8))
    assert read_image(tmp_path / "rgb.jp2").shape == deep.shape
    assert cv2.imwrite(str(tmp_path / "x.avif"), deep >> 6, [cv2.IMWRITE_AVIF_DEPTH, 10])
    with pytest.raises(ValueError, match="has 10 bits per channel"):
        read_image(tmp_path / "x.avif")


@pytest.mark.parametrize(
    ("array", "mend"),
    [
        (np.zeros((4, 5, 3), np.float32), "scale it to 0..255 as you mean it"),
        (np.zeros((4, 5, 3), np.uint16), "scale it to 0..255"),
        (np.zeros((4, 5, 3), bool), "scale it to 0..255"),
        (np.zeros((4, 5, 4), np.uint8), "drop or blend its alpha"),
        (np.zeros((3, 4, 5), np.uint8), r"image\.transpose\(1, 2, 0\)"),
        (np.zeros((4, 5), np.uint8), "repeat a grey image"),
        (np.zeros((0, 5, 3), np.uint8), ""),
    ],
)
def test_arrays_of_another_kind_are_refused(array, mend):
    with pytest.raises(ValueError, match=rf"an array image must be uint8 \[H, W, 3\], not .*{mend}"):
        to_rgb(array)


def exif(value: int, more: bytes = b"") -> bytes:
    """EXIF with an orientation, and one entry more, which points to -1/0."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, value, 0) + more
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1 + bool(more))
    return head + entries + bytes(4) + struct.pack("<ii", -1, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(tmp_path, orientation):
    """Turned as Pillow turns, from every format; what cannot be written again does no harm."""
    stored = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    plain = Image.fromarray(stored)
    plain.getexif()[0x112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(plain))
    assert np.array_equal(turn(stored, orientation), wanted) and np.array_equal(to_rgb(plain), wanted)
    resolution = struct.pack("<HHII", 0x11A, 10, 1, 8 + 2 + 24 + 4)  # -1/0, which Pillow reads and cannot write
    for name in ("a.png", "a.tif", "a.jpg"):
        data = plain.getexif() if name == "a.tif" else exif(orientation, resolution)
        Image.fromarray(stored).save(tmp_path / name, exif=data, **({"quality": 100} if name == "a.jpg" else {}))
        got = read_image(tmp_path / name)
        assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted).mean() < 6, name
    broken = b"Exif\0\0II*\0\xff\xff\xff\xff"
    Image.fromarray(stored).save(tmp_path / "b.jpg", quality=100, exif=broken)
    assert read_image(tmp_path / "b.jpg").shape == stored.shape


def test_a_mask_turns_with_its_image():
    mask = np.arange(24).reshape(4, 6)
    square = mask[:, :4]
    for orientation in range(1, 9):
        upright = turn(mask, orientation)
        size = upright.shape
        assert np.array_equal(turn_mask(mask, 1, orientation, size), upright)  # drawn on the stored pixels
        assert np.array_equal(turn_mask(mask, orientation, orientation, size), upright)  # and it says so itself
        if orientation >= 5:  # drawn on the upright pixels, as its size shows
            assert np.array_equal(turn_mask(upright, 1, orientation, size), upright)
        else:  # or as other masks show
            assert np.array_equal(turn_mask(upright, 1, orientation, size, upright=True), upright)
        assert np.array_equal(turn_mask(square, 1, orientation, (4, 4)), turn(square, orientation))


def test_values_that_pillow_changes_are_no_labels(tmp_path):
    header = struct.pack(">IIBBBBB", 4, 2, 4, 0, 0, 0, 0)  # a grey PNG of 4 bits, which Pillow scales to 8
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\x01\x23\0\x45\x67")), (b"IEND", b""))
    parts = [(struct.pack(">I", len(data)), kind + data) for kind, data in chunks]
    png = [length + part + struct.pack(">I", zlib.crc32(part)) for length, part in parts]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))
    (tmp_path / "a.pgm").write_bytes(b"P5 4 2 7\n" + bytes(range(8)))
    for name in ("a.png", "a.pgm"):
        with pytest.raises(ValueError, match="whose values Pillow scales; store masks as PNG of 8 bits"):
            read_labels(tmp_path / name)
    values = np.arange(8, dtype=np.uint8).reshape(2, 4)
    palette = Image.fromarray(values, "P")
    palette.putpalette(range(24))
    for image in (Image.fromarray(values), palette):
        image.save(tmp_path / "b.png")
        assert np.array_equal(read_labels(tmp_path / "b.png")[0], values)
    cv2.imwrite(str(tmp_path / "b.png"), values.astype(np.uint16) * 1000)
    assert np.array_equal(read_labels(tmp_path / "b.png")[0], values.astype(int) * 1000)


def test_images_are_known_by_content(tmp_path):
    picture(0).save(tmp_path / "photo.jpg", "PNG")
    picture(0).save(tmp_path / "no_suffix", "WEBP")
    (tmp_path / "text").write_text("P1 is no image here")
    assert np.array_equal(read_image(tmp_path / "photo.jpg"), picture(0))
    assert is_image(tmp_path / "no_suffix") and not is_image(tmp_path / "text") and not is_image(tmp_path)
