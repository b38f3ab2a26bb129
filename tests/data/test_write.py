"""Writing: every kind of source and image, unreadable files by name, and nothing lost or left behind when it fails."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import eval_loader, inspect
from data.sources import ImageFolder, to_rgb
from data.write import main, write

ROOT = Path(__file__).parents[2]


def picture(index: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of three images, and files that are no images."""
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "ant")):
        (root / name).mkdir(parents=True)
        for index in range(3):
            picture(10 * label + index).save(root / name / f"{index}.png")
    (root / "readme.txt").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("not an image")
    return root


def content(path: Path, **settings) -> tuple[np.ndarray, list[int] | None]:
    """The images, uint8 [N, H, W, 3], and labels of a file of equal images."""
    height, width = inspect(path).max_size
    loader = eval_loader(path, image_size=(height, width), batch_size=16, mean=(0, 0, 0), std=(1, 1, 1), workers=1)
    batches = list(loader.epoch())
    images = torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1) * 255
    labels = torch.cat([batch["label"] for batch in batches]).tolist() if loader.has_labels else None
    return images.round().to(torch.uint8).numpy(), labels


def error_line(capsys) -> str:
    """The one line of an error; the progress and the names of unreadable files go before it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def test_a_class_a_subfolder(folder, tmp_path):
    out = tmp_path / "new" / "x.beton"
    run = subprocess.run(
        [sys.executable, "-m", "data.write", folder, out, "--raw_share", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and "Warning" not in run.stderr
    assert "6 images, labelled: 2 classes" in run.stdout
    side = json.loads((out.parent / "x.beton.json").read_text())
    assert side["classes"] == ["ant", "cat"] and side["count"] == 6 and side["skipped"] == []
    assert side["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest() and side["bytes"] == out.stat().st_size
    assert side["source"] == str(folder) and side["settings"]["raw_share"] == 1
    assert sorted(os.listdir(out.parent)) == ["x.beton", "x.beton.json"]
    assert inspect(out).classes == ["ant", "cat"]
    images, labels = content(out)
    assert labels == [0, 0, 0, 1, 1, 1]
    assert all(np.array_equal(images[i], picture(10 + i)) for i in range(3))
    assert all(np.array_equal(images[3 + i], picture(i)) for i in range(3))


def test_what_a_folder_is_taken_for(folder, tmp_path):
    assert ImageFolder(folder).classes == ["ant", "cat"]
    assert ImageFolder(folder, unlabelled=True).classes is None
    assert "a single subfolder" in ImageFolder(folder.parent).why or "deeper" in ImageFolder(folder.parent).why
    (folder / "cat" / "deep").mkdir()
    picture(0).save(folder / "cat" / "deep" / "x.jpg")
    assert "deeper" in ImageFolder(folder).why and ImageFolder(folder).classes is None
    picture(0).save(folder / "x.jpg")
    assert "directly in" in ImageFolder(folder).why
    assert len(ImageFolder(folder)) == 8
    write(ImageFolder(folder), tmp_path / "x.beton", progress=False)
    assert not inspect(tmp_path / "x.beton").has_labels


def test_user_mistakes_are_one_line_and_status_2(folder, tmp_path, capsys):
    out = tmp_path / "x.beton"
    (folder / "empty").mkdir()
    (tmp_path / "none").mkdir()
    cases = [
        ([folder, out], "class folders without images: empty; remove them, or pass --unlabelled"),
        ([tmp_path / "missing", out], "missing: no such folder"),
        ([tmp_path / "none", out], "holds no images"),
        ([folder, tmp_path, "--unlabelled"], "is a folder; name a file"),
        ([folder, out, "--unlabelled", "--quality", 0], "quality 0: must be in 1..100"),
        ([folder, out, "--unlabelled", "--raw_share", "1.5"], "raw_share 1.5"),
        ([folder, out, "--unlabelled", "--raw_share", "some"], "raw_share"),
        ([folder, out, "--unlabelled", "--max_side", 70000], "max_side 70000"),
        ([folder, out, "--colour"], "unrecognized arguments: --colour"),
        ([folder], "required: out"),
    ]
    for arguments, message in cases:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        assert status == 2 and message in error_line(capsys)
    assert not list(tmp_path.glob("*x.beton*"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_unreadable_files(folder, tmp_path, capsys):
    out = tmp_path / "x.beton"
    out.write_bytes(b"older")
    (folder / "ant" / "1.png").write_bytes((folder / "ant" / "1.png").read_bytes()[:40])
    (folder / "cat" / "9.jpg").write_text("no image")
    assert main([str(folder), str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("unreadable: ") for line in lines) == 2
    assert lines[-1].startswith("error: 2 of 7 images unreadable, the first is") and "ant/1.png" in lines[-1]
    assert out.read_bytes() == b"older" and os.listdir(tmp_path) == ["images", "x.beton"]

    assert main([str(folder), str(out), "--skip_unreadable", "--raw_share", "1"]) == 0
    skipped = json.loads((tmp_path / "x.beton.json").read_text())["skipped"]
    assert [Path(entry["name"]).name for entry in skipped] == ["1.png", "9.jpg"] and skipped[0]["reason"]
    images, labels = content(out)
    assert labels == [0, 0, 1, 1, 1]
    for image, index in zip(images, [10, 12, 0, 1, 2], strict=True):
        assert np.array_equal(image, picture(index))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(folder / "cat", target_is_directory=True)
    (tmp_path / "linked" / "b").mkdir()
    (tmp_path / "linked" / "b" / "x.png").symlink_to(folder / "ant" / "0.png")
    dataset = ImageFolder(tmp_path / "linked")
    assert dataset.classes == ["a", "b"] and len(dataset) == 4 and np.array_equal(dataset[3][0], picture(10))
    (folder / "cat" / "on").symlink_to(tmp_path / "linked" / "b")
    assert len(ImageFolder(tmp_path / "linked")) == 5
    for target in (tmp_path, tmp_path / "linked", folder / "cat"):  # upwards, and two that lead to each other
        (tmp_path / "linked" / "b" / "back").symlink_to(target)
        with pytest.raises(ValueError, match="leads back to a folder that it lies in; remove the link"):
            ImageFolder(tmp_path / "linked")
        (tmp_path / "linked" / "b" / "back").unlink()


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


def test_all_unreadable(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_text("no image")
    with pytest.raises(ValueError, match="none of the 2 images is readable"):
        write(ImageFolder(tmp_path), tmp_path / "x.beton", skip_unreadable=True, progress=False)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = picture(1)
    gray16 = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    kinds = {
        "rgba.png": rgb.convert("RGBA"), "gray.png": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"),
        "gray16.png": gray16, "palette.gif": rgb.convert("P"), "bit.png": rgb.convert("1"), "turned.jpg": rgb,
    }  # fmt: skip
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"exif": exif} if name == "turned.jpg" else {}))
    dataset = ImageFolder(tmp_path)
    pixels = {dataset.files[index].name: dataset[index][0] for index in range(len(dataset))}
    assert pixels.keys() == kinds.keys()
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in pixels.values())
    assert np.array_equal(pixels["rgba.png"], rgb)
    assert np.array_equal(pixels["gray16.png"], pixels["gray.png"])
    assert pixels["turned.jpg"].shape == (20, 16, 3)
    with pytest.raises(ValueError, match="no fixed range"):
        to_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_dataset_objects(tmp_path):
    """Tuples as torchvision's, dicts as Hugging Face's, with masks, at the settings asked for."""

    class Pictures:
        classes = ("even", "odd")

        def __len__(self):
            return 30

        def __getitem__(self, index):
            return picture(index, (40, 30)), index % 2

    side = write(Pictures(), tmp_path / "x.beton", max_side=20, raw_share=0, quality=95, progress=False)
    assert side["classes"] == ["even", "odd"] and inspect(tmp_path / "x.beton").max_size == (15, 20)
    images, labels = content(tmp_path / "x.beton")
    assert labels == [index % 2 for index in range(30)]
    assert np.abs(images[3].astype(int) - np.asarray(picture(3, (20, 15)))).mean() < 6  # JPEG, and another resize

    items = [{"img": picture(i), "y": i, "mask": np.full((16, 20), i), "id": "x"} for i in range(5)]
    write(items, tmp_path / "y.beton", image_key="img", label_key="y", progress=False)
    info = inspect(tmp_path / "y.beton")
    assert info.has_masks and info.max_label == 4 and info.classes is None

    with pytest.raises(ValueError, match=r"1 of 2 images unreadable, the first is item 1 \(ValueError: label -1"):
        write([(picture(0), 0), (picture(0), -1)], tmp_path / "z.beton", progress=False)
    with pytest.raises(ValueError, match="an image must be a PIL image or a uint8 array, not Tensor"):
        write([torch.zeros(3, 4, 4)], tmp_path / "z.beton", progress=False)


def test_torchvision(folder, tmp_path):
    from torchvision.datasets import ImageFolder as TorchvisionFolder

    (folder / "cat" / ".hidden.png").unlink()
    side = write(TorchvisionFolder(folder), tmp_path / "x.beton", raw_share=1, progress=False)
    assert side["classes"] == ["ant", "cat"] and side["source"] == "torchvision.datasets.folder.ImageFolder"
    write(ImageFolder(folder), tmp_path / "y.beton", raw_share=1, progress=False)
    assert np.array_equal(content(tmp_path / "x.beton")[0], content(tmp_path / "y.beton")[0])


def test_smart_and_shares(tmp_path):
    items = [np.zeros((side, side, 3), np.uint8) for side in [10, 200] * 40]
    sizes = {}
    for raw_share in ("smart", 0, 0.5, 1):
        side = write(items, tmp_path / "x.beton", raw_share=raw_share, workers=1, progress=False)
        content_bytes = (tmp_path / "x.beton").read_bytes()
        sizes[raw_share] = content_bytes.count(b"\xff\xd8\xff")
        assert side["settings"]["raw_share"] == raw_share
    assert sizes["smart"] == 40 and sizes[0] == 80 and sizes[1] == 0 and 20 < sizes[0.5] < 60


def test_an_image_larger_than_a_page(tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3)).astype(np.uint8)  # 8.7 MB, pages have 8.4
    write([np.zeros((9, 9, 3), np.uint8), large], tmp_path / "x.beton", raw_share=1, progress=False)
    images, _ = content(tmp_path / "x.beton")
    assert np.array_equal(images[1], large)


class Deadly:
    """A dataset that ends the process that reads its item 70."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        if index == 70:
            os.kill(os.getpid(), signal.SIGKILL)
        return picture(index)


def test_a_killed_process_is_an_error_not_a_hang(tmp_path):
    (tmp_path / "x.beton").write_bytes(b"older")
    with pytest.raises(RuntimeError, match="a writing process was killed"):
        write(Deadly(), tmp_path / "x.beton", progress=False)
    assert os.listdir(tmp_path) == ["x.beton"] and (tmp_path / "x.beton").read_bytes() == b"older"


def _can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a user namespace to mount a small file system")
def test_no_space_left(tmp_path):
    for index in range(40):
        noise = np.random.default_rng(index).integers(0, 256, (500, 500, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png", compress_level=0)
    script = """
        mount -t tmpfs -o size=20m tmpfs "$1" && echo older > "$1/x.beton"
        "$2" -m data.write "$3" "$1/x.beton" --raw_share 1; echo "status $?"; ls -A "$1"; cat "$1/x.beton"
    """
    (tmp_path / "small").mkdir()
    command = ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path / "small", sys.executable, tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.stdout.splitlines()[-3:] == ["status 2", "x.beton", "older"]
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "no space left for x.beton; make room" in error
