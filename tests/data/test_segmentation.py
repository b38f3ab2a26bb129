"""Masks: read from the layouts as distributed, stored without loss, and never parted from their images."""

import colorsys
import json
import os
import re
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data import IGNORE, inspect, original_loader, train_loader
from data.augment import distort, masked_view, uniform
from data.class_table import TABLES, default_palette, read_table
from data.images import turn
from data.runs import encode_runs, read_runs
from data.segmentation import open_pairs
from data.write import main, write

RNG = np.random.default_rng(0)
SAME = {"mean": (0, 0, 0), "std": (1, 1, 1), "workers": 1}


def save_mask(path: Path, labels: np.ndarray, palette: list[list[int]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette is not None:
        image = Image.fromarray(labels.astype(np.uint8), mode="P")
        image.putpalette([part for colour in palette for part in colour])
    image.save(path)


def save_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return np.asarray(Image.open(path))


def ade20k(root: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """A tree in its exact layout, and what is in it: images and values, a split."""
    content: dict[str, list] = {"training": [], "validation": []}
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            size = (20 + number, 30)
            labels = (np.arange(size[0] * size[1]) + number).reshape(size) % (151 if split == "training" else 20)
            name = f"{split}/ADE_{short}_{number:08d}"
            image = save_image(root / "images" / f"{name}.jpg", size)
            save_mask(root / "annotations" / f"{name}.png", labels)
            content[split].append((image, labels))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    return content


def cityscapes(root: Path, kind: str = "labelIds") -> list[tuple[np.ndarray, np.ndarray]]:
    content = []
    for city, number in (("aachen", 19), ("aachen", 4), ("bochum", 0)):
        name, size = f"{city}_{number:06d}_000019", (24, 48)
        values = [*range(34)] if kind == "labelIds" else [*range(19), 255]
        labels = RNG.choice(values, size)
        image = save_image(root / "leftImg8bit/train" / city / f"{name}_leftImg8bit.png", size)
        fine = root / "gtFine/train" / city
        save_mask(fine / f"{name}_gtFine_{kind}.png", labels)
        save_mask(fine / f"{name}_gtFine_instanceIds.png", labels)
        Image.fromarray(image).save(fine / f"{name}_gtFine_color.png")
        (fine / f"{name}_gtFine_polygons.json").write_text("{}")
        content.append((name, image, labels))
    return [item[1:] for item in sorted(content, key=lambda item: item[0])]


def voc(root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    content = []
    for number in range(3):
        size = (16, 20 + number)
        labels = RNG.choice([*range(21), 255], size)
        image = save_image(root / "JPEGImages" / f"2007_{number:06d}.jpg", size)
        save_mask(root / "SegmentationClass" / f"2007_{number:06d}.png", labels, default_palette(256))
        content.append((image, labels))
    save_image(root / "JPEGImages" / "2007_000009.jpg", (9, 9))  # of another task
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000002\n2007_000000\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n")
    return content


def folders(root: Path, labels: np.ndarray | None = None) -> tuple[Path, Path, Path]:
    """Two images with masks of values 0, 7 and 255, and a table."""
    labels = np.array([[0, 7, 255], [7, 7, 0]]).repeat(4, 0).repeat(5, 1) if labels is None else labels
    for name in ("x/1", "2"):
        save_image(root / "images" / f"{name}.png", labels.shape)
        save_mask(root / "masks" / f"{name}.png", labels)
    (root / "table.csv").write_text("value,name,red,green,blue\n7,leaf,0,255,0\n0,soil\n")
    return root / "images", root / "masks", root / "table.csv"


def same_items(dataset, content: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert len(dataset) == len(content)
    for index, (image, mask) in enumerate(content):
        item = dataset[index]
        assert np.array_equal(item["image"], image) and np.array_equal(item["mask"], mask)
        assert item["mask"].dtype == np.uint8


def test_ade20k(tmp_path):
    content = ade20k(tmp_path / "ADEChallengeData2016")
    for split, folder in (("train", "training"), ("val", "validation")):
        wanted = [(image, np.where(labels == 0, IGNORE, labels - 1)) for image, labels in content[folder]]
        same_items(open_pairs(tmp_path, split=split), wanted)
    dataset = open_pairs(tmp_path / "ADEChallengeData2016")
    assert len(dataset.mask_classes) == len({*dataset.mask_classes}) == 150 and "ade20k, its train split" in dataset.why
    assert dataset.mask_classes[:3] == ["wall", "building", "sky"] and dataset.mask_classes[-1] == "flag"
    assert dataset.palette[0] == [120, 120, 120] and dataset.palette[149] == [92, 0, 255]
    with pytest.raises(ValueError, match="split 'test': ade20k has only train and val"):
        open_pairs(tmp_path, split="test")


def test_cityscapes(tmp_path):
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    to_train = np.full(34, IGNORE)
    to_train[ids] = np.arange(19)
    content = [(image, to_train[labels]) for image, labels in cityscapes(tmp_path / "ids")]
    same_items(open_pairs(tmp_path / "ids"), content)
    train_ids = cityscapes(tmp_path / "train_ids", "labelTrainIds")
    dataset = open_pairs(tmp_path / "train_ids")
    same_items(dataset, train_ids)
    assert dataset.mask_classes == open_pairs(tmp_path / "ids").mask_classes
    assert dataset.mask_classes[0] == "road" and dataset.mask_classes[-1] == "bicycle"
    assert dataset.palette == open_pairs(tmp_path / "ids").palette and dataset.palette[13] == [0, 0, 142]


def test_voc(tmp_path):
    content = voc(tmp_path / "VOCdevkit" / "VOC2012")
    for root in (tmp_path, tmp_path / "VOCdevkit" / "VOC2012"):
        same_items(open_pairs(root), [content[2], content[0]])
        same_items(open_pairs(root, "voc", "val"), [content[1]])
    dataset = open_pairs(tmp_path)
    assert len(dataset.mask_classes) == 21 and dataset.mask_classes[15] == "person"
    assert dataset.palette == default_palette(21) and dataset.palette[15] == [192, 128, 128]


def test_a_pair_of_folders(tmp_path):
    images, masks, table = folders(tmp_path)
    dataset = open_pairs(images, masks=masks, classes=table)
    assert dataset.mask_classes == ["leaf", "soil"] and dataset.palette == [[0, 255, 0], default_palette(2)[1]]
    labels = np.array([[1, 0, 255], [0, 0, 1]]).repeat(4, 0).repeat(5, 1)
    same_items(dataset, [(np.asarray(Image.open(images / name)), labels) for name in ("2.png", "x/1.png")])
    save_mask(masks / "2.png", np.where(labels == 255, 9, 7))
    table.write_text("7,leaf\n255,edge\n9,\n")  # a value that is ignored by name, and 255 that is not
    dataset = open_pairs(images, masks=masks, classes=table)
    assert np.array_equal(dataset[0]["mask"], np.where(labels == 255, 255, 0))


def test_masks_of_turned_photos(tmp_path):
    """Masks of one set were drawn on stored or on upright pixels: those whose size tells speak for all."""
    stored = (np.arange(24) // 3 % 2).astype(np.uint8).reshape(4, 6)
    pixels = Image.fromarray((255 * stored).repeat(3).reshape(4, 6, 3))
    (tmp_path / "table.csv").write_text("0,a\n1,b\n")

    def agree(upright: set[int]) -> bool:
        for orientation in range(1, 9):
            pixels.getexif()[0x112] = orientation
            (tmp_path / "images").mkdir(exist_ok=True)
            pixels.save(tmp_path / f"images/{orientation}.png", exif=pixels.getexif())
            mask = turn(stored, orientation) if orientation in upright else stored
            save_mask(tmp_path / f"masks/{orientation}.png", mask)
        dataset = open_pairs(tmp_path / "images", masks=tmp_path / "masks", classes=tmp_path / "table.csv")
        return all(np.array_equal(item["image"][..., 0] > 0, item["mask"]) for item in dataset)

    assert agree(set()) and agree(set(range(1, 9)))
    with pytest.raises(ValueError, match=r"images/2\.png: has an EXIF orientation that its mask may follow or not"):
        agree({5, 6})


def test_tables():
    for path in sorted(TABLES.glob("*.csv")):
        table = read_table(path)
        assert len({*map(tuple, table.palette)}) > 0.98 * len(table.names), path  # ADE20K has one colour twice
    assert (read_table(TABLES / "cityscapes.csv").classes >= 0).sum() == 35  # ids 0 to 33, and 255


def test_runs():
    masks = [np.zeros((1, 1)), np.full((16, 16), 3), np.full((1, 257), 255), np.arange(600).reshape(20, 30) // 512]
    masks += [RNG.integers(0, 256, (37, 41)), RNG.integers(0, 2, (64, 64)).repeat(8, 1), np.eye(99)]
    for mask in masks:
        runs, out = encode_runs(mask.astype(np.uint8)), np.full(mask.shape, 77, np.uint8)
        assert read_runs(runs.ctypes.data, runs.size, out) and np.array_equal(out, mask)
        for size in (0, 1, runs.size - 2, runs.size - 1):
            assert not read_runs(runs.ctypes.data, size, out)
        twice = np.concatenate([runs, runs])
        assert not read_runs(twice.ctypes.data, twice.size, out)
    assert encode_runs(np.zeros((1024, 2048), np.uint8)).size == 2 * 8192


class Blocks:
    """Pictures of many sizes whose colour says the label: blocks of 6 classes and unlabelled ones."""

    mask_classes = tuple("abcdef")
    colours = np.array([[10 + 40 * label, 250 - 40 * label, 40 * (label * 5 % 6)] for label in range(6)], np.uint8)

    def __len__(self) -> int:
        return 41

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([7, index])
        labels = rng.integers(0, 7, rng.integers(2, 6, 2)).repeat(24, 0).repeat(24, 1)
        labels = labels[: len(labels) - index % 3]  # sizes that blocks do not divide
        colours = np.concatenate([self.colours, [[255, 255, 255]]])
        return {"image": colours[labels].astype(np.uint8), "mask": np.where(labels == 6, IGNORE, labels)}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("segmentation") / "blocks.beton"
    write(Blocks(), path, raw_share=1.0, progress=False)
    return path


VIEWS = {"image_size": (40, 56), "batch_size": 8, "seed": 3, "masks": True}


@pytest.fixture(scope="module")
def plain(blocks):
    mean = (51 / 255, 102 / 255, 153 / 255)
    loader = train_loader(blocks, **VIEWS, photometric=False, mean=mean, std=(1 / 255,) * 3, workers=2)
    return [{key: value.clone() for key, value in batch.items()} for batch in loader.epoch(1)]


def test_image_and_mask_stay_together(plain):
    """The colours of a view are those of its labels, but next to an edge, where they are mixed."""
    colours, flips, padded, checked = Blocks.colours.astype(int), set(), 0, 0
    for batch in plain:
        assert batch["mask"].dtype == torch.uint8 and batch["mask"].shape == (8, 40, 56)
        assert batch["image"].shape == (8, 3, 40, 56) and "label" not in batch and batch["mask"].is_contiguous()
        for image, mask, index in zip(batch["image"], batch["mask"].numpy(), batch["index"].tolist(), strict=True):
            pixels = (image.permute(1, 2, 0).numpy() + np.array([51, 102, 153])).round().astype(int)
            stored = Blocks()[index]["mask"].astype(np.uint8)
            top, left, h, w, flip, rows, columns = masked_view(3, 1, index, stored, (40, 56), (0.5, 2.0), 0.5, 0.75)
            flips.add(flip)
            # The labels themselves, by a naive nearest neighbour.
            wanted = np.full((40, 56), IGNORE)
            for y in range(rows):
                for x in range(columns):
                    wanted[y, x] = stored[top + int((y + 0.5) * h / rows), left + int((x + 0.5) * w / columns)]
            wanted = wanted[:, ::-1] if flip else wanted
            assert np.array_equal(mask, wanted)
            beyond = np.ones((40, 56), bool)
            beyond[:rows, :columns] = False
            beyond = beyond[:, ::-1] if flip else beyond
            assert (pixels[beyond] == (51, 102, 153)).all() and (mask[beyond] == IGNORE).all()
            padded += beyond.any()
            inner = cv2.erode(mask, np.ones((5, 5))) == cv2.dilate(mask, np.ones((5, 5)))
            inner &= (mask != IGNORE) & ~beyond
            inner[[0, -1]] = inner[:, [0, -1]] = False  # beyond which there may be another label
            assert np.abs(pixels[inner] - colours[mask[inner]]).max(initial=0) <= 1
            checked += inner.sum()
    assert flips == {False, True} and padded > 5 and checked > 10_000


def test_photometric_changes_touch_the_image_alone(blocks, plain):
    """Also: by another rank, with other workers, in the windowed order, the masks of an index are the same."""
    loader = train_loader(
        blocks, **VIEWS, workers=1, rank=1, world_size=2, order="windowed", window=1, mean=(0, 0, 0), std=(1, 1, 1)
    )
    seen = {
        index: (image, mask)
        for batch in plain
        for index, image, mask in zip(batch["index"].tolist(), batch["image"], batch["mask"], strict=True)
    }
    shared = differ = 0
    for batch in loader.epoch(1):
        assert len(batch["mask"]) == 4
        for index, image, mask in zip(batch["index"].tolist(), batch["image"] * 255, batch["mask"], strict=True):
            if index in seen:
                shared += 1
                assert torch.equal(mask, seen[index][1])
                offset = torch.tensor([51.0, 102.0, 153.0]).view(3, 1, 1)
                differ += not torch.allclose(image, seen[index][0] + offset, atol=0.6)
    assert shared > 10 and differ > shared // 2


def test_distortion_is_as_defined():
    image = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    changed = 0
    for index in range(60):
        draws = [uniform(5, 2, index, draw) for draw in range(22, 31)]
        out = image.copy()
        distort(out, 5, 2, index)
        brightness = 64 * draws[1] - 32 if draws[0] < 0.5 else 0
        contrast = 0.5 + draws[3] if draws[2] < 0.5 else 1
        saturation = 0.5 + draws[5] if draws[4] < 0.5 else 1
        turn = (1.2 * draws[7] - 0.6) / 6 if draws[6] < 0.5 else 0
        wanted = (image + brightness).clip(0, 255)
        if draws[8] < 0.5:
            wanted = (wanted * contrast).clip(0, 255)
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in wanted.reshape(-1, 3) / 255]
        rgb = [colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), v) for h, s, v in hsv]
        wanted = np.array(rgb).reshape(image.shape) * 255
        if draws[8] >= 0.5:
            wanted = (wanted * contrast).clip(0, 255)
        assert np.abs(out - wanted).max() <= 0.5 + 1e-6
        changed += not np.array_equal(out, image)
    assert 45 < changed < 60


def test_crops_of_one_class_are_drawn_again():
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 60:90] = 3
    mask[50:, :30] = IGNORE
    redrawn = kept = 0
    for index in range(300):
        top, left, h, w, *_ = masked_view(1, 4, index, mask, (32, 32), (1.0, 1.0), 0.5, 0.75)
        assert (h, w) == (64, 64)  # the shorter side becomes the view's
        top, left, h, w, *_ = masked_view(1, 4, index, mask, (32, 32), (2.0, 2.0), 0.5, 0.75)
        places = [
            (int(uniform(1, 4, index, 2 + 2 * attempt) * 33), int(uniform(1, 4, index, 3 + 2 * attempt) * 65))
            for attempt in range(10)
        ]

        def fits(place: tuple[int, int]) -> bool:
            labels = mask[place[0] : place[0] + 32, place[1] : place[1] + 32]
            counts = np.bincount(labels[labels != IGNORE])
            return counts.sum() > 0 and counts.max() <= 0.75 * counts.sum()

        first = next((place for place in places if fits(place)), places[-1])
        assert (top, left) == first and (h, w) == (32, 32)
        redrawn, kept = redrawn + (first != places[0]), kept + fits(first)
        free = masked_view(1, 4, index, mask, (32, 32), (2.0, 2.0), 0.5, 1.0)
        assert free[:2] == places[0]
    assert redrawn > 100 and kept > 280


def test_every_image_once_at_its_original_size(blocks):
    loaders = [original_loader(blocks, batch_size=3, rank=rank, world_size=2, **SAME) for rank in range(2)]
    batches = [list(loader.epoch()) for loader in loaders]
    assert len({len(loader) for loader in loaders} | {len(rank) for rank in batches}) == 1
    seen, largest = [], 0
    for batch in (batch for rank in batches for batch in rank):
        assert len(batch["image"]) == len(batch["mask"]) <= 3 and batch["image"].shape[2:] == batch["mask"].shape[1:]
        assert len({*batch["valid"].tolist()}) == 1
        largest = max(largest, len(batch["image"]))
        seen += batch["index"][batch["valid"]].tolist()
        for image, mask, index in zip(batch["image"], batch["mask"], batch["index"].tolist(), strict=True):
            item = Blocks()[index]
            assert np.array_equal((image * 255).round().permute(1, 2, 0).numpy(), item["image"])
            assert np.array_equal(mask, item["mask"])
    assert sorted(seen) == list(range(41)) and largest == 3
    areas = [[batch["mask"][0].numel() for batch in rank] for rank in batches]
    assert all(rank == sorted(rank) for rank in areas)
    rest = list(loaders[0].epoch(start=4))
    assert [batch["index"].tolist() for batch in rest] == [batch["index"].tolist() for batch in batches[0][4:]]
    chosen = original_loader(blocks, batch_size=3, indices=np.array([5, 30, 2]), **SAME)
    assert sorted(i for b in chosen.epoch() for i in b["index"][b["valid"]].tolist()) == [2, 5, 30]


def test_written_and_described(tmp_path, capsys):
    voc(tmp_path)
    out = tmp_path / "x.beton"
    assert main([str(tmp_path), str(out), "--task", "segmentation", "--raw_share", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 images, voc, its train split, with masks" in said and "pixels: background " in said
    side, info = json.loads((tmp_path / "x.beton.json").read_text()), inspect(out)
    dataset = open_pairs(tmp_path)
    labels = np.concatenate([dataset[index]["mask"].reshape(-1) for index in range(2)])
    assert side["pixels"] == [int((labels == number).sum()) for number in range(21)]
    assert side["unlabelled"] == (labels == IGNORE).sum() and side["classes"] is None
    assert info.has_masks and not info.has_labels and info.mask_classes == dataset.mask_classes
    assert info.palette == default_palette(21)
    shifted = ["--corrupt", "contrast", "--severity", "5", "--split", "train", "--raw_share", "1"]
    assert main([str(tmp_path), str(tmp_path / "y.beton"), "--task", "segmentation", *shifted]) == 0
    again = json.loads((tmp_path / "y.beton.json").read_text())
    assert again["pixels"] == side["pixels"] and again["sha256"] != side["sha256"]
    content = json.dumps(side | {"palette": [[0, 0]] * 21})
    (tmp_path / "x.beton.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.beton\.json: not such a file \(`palette` is not one colour per class\)"):
        inspect(out)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_class_without_a_pixel(tmp_path, capsys):
    """Is an error, unless it is of a split to judge on, or let pass."""
    ade20k(tmp_path)
    images, masks, table = folders(tmp_path / "pair")
    table.write_text(table.read_text() + "9,stone\n10,water\n")
    pair = [str(images), str(tmp_path / "x.beton"), "--masks", str(masks), "--classes", str(table)]
    assert main([*pair, "--task", "segmentation"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "classes without a pixel in any mask: 2 stone, 3 water; mend the class table, or let it pass" in said
    assert not list(tmp_path.glob("*.beton*")) and not list(tmp_path.glob(".*"))
    for arguments in ([*pair, "--allow_empty"], [str(tmp_path), str(tmp_path / "y.beton"), "--split", "val"]):
        assert main([*arguments, "--task", "segmentation"]) == 0
        assert "classes without a pixel: " in capsys.readouterr().out
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def other_size(root: Path) -> None:
    save_mask(root / "masks/2.png", np.zeros((9, 15)))


def no_mask(root: Path) -> None:
    (root / "masks/2.png").unlink()


def no_image(root: Path) -> None:
    save_mask(root / "masks/3.png", np.zeros((8, 15)))


def other_label(root: Path) -> None:
    save_mask(root / "masks/2.png", np.full((8, 15), 8))


def twins(root: Path) -> None:
    save_image(root / "images/2.bmp", (8, 15))


def jpeg(root: Path) -> None:
    (root / "masks/2.png").rename(root / "masks/2.jpg")


def hidden_jpeg(root: Path) -> None:
    Image.new("L", (15, 8)).save(root / "masks/2.png", "JPEG")


def in_colour(root: Path) -> None:
    Image.new("RGB", (15, 8)).save(root / "masks/2.png")


def no_picture(root: Path) -> None:
    (root / "masks/2.png").write_text("labels")


def table(text: str):
    return lambda root: (root / "table.csv").write_text(text)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (other_size, r"2\.png is 15 x 9 pixels, the image 15 x 8"),
        (no_mask, r"images/2\.png: has no mask in .*masks; add or remove"),
        (no_image, r"masks/3\.png: has no image in .*images; add or remove"),
        (other_label, r"masks/2\.png has label 8, which is not in the class table"),
        (twins, r"images/2\.bmp and .*images/2\.png: are two files of one name"),
        (jpeg, r"masks/2\.jpg: a mask stored as JPG, which changes labels"),
        (hidden_jpeg, r"masks/2\.png is stored as JPEG, which changes labels"),
        (in_colour, r"masks/2\.png is of colours \(RGB\), not of labels"),
        (no_picture, r"masks/2\.png cannot identify image file"),
        (table("7,leaf\n0,leaf\n"), r"table\.csv: line 2 has a value or a name that an earlier line has"),
        (table("7,leaf\nsoil,0\n"), r"table\.csv: line 2 is not value,name,red,green,blue"),
        (table("7,leaf,300,0,0\n"), r"table\.csv: line 1 has a value outside 0\.\.65535, or no colour in 0\.\.255"),
        (table("value,name\n"), r"table\.csv: has 0 classes; a table must have 1 to 255"),
        (table("\n".join(f"{i},{i}" for i in range(300))), r"table\.csv: has 300 classes"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, harm, said):
    images, masks, given = folders(tmp_path)
    harm(tmp_path)
    before = sorted(os.listdir(tmp_path))
    arguments = [images, tmp_path / "x.beton", "--task", "segmentation", "--masks", masks, "--classes", given]
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(said, lines[0]), lines
    assert sorted(os.listdir(tmp_path)) == before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_wrong_arguments(tmp_path, capsys):
    images, masks, given = folders(tmp_path)
    voc(tmp_path / "voc")
    task = ["--task", "segmentation"]
    for arguments, said in (
        ([images, *task], "is none of ade20k, cityscapes, voc; say where its masks are with --masks FOLDER"),
        ([images, *task, "--masks", masks], "say what its masks' values mean with --classes TABLE.csv"),
        ([images, *task, "--masks", tmp_path / "no"], "no: no such folder"),
        ([images, *task, "--masks", masks, "--classes", tmp_path / "no.csv"], "no.csv: no such class table"),
        ([images, *task, "--masks", masks, "--classes", given, "--split", "val"], "without splits"),
        ([images, *task, "--masks", masks, "--classes", given, "--max_side", 4], "stored at their own size"),
        ([images, "--masks", masks], "belong to --task segmentation"),
        ([tmp_path / "voc", *task, "--masks", masks, "--layout", "voc"], "which has its own; leave out --masks"),
        ([tmp_path / "voc", *task, "--layout", "cifar"], "with masks must be folder, ade20k, cityscapes, voc"),
        ([tmp_path / "voc", *task, "--split", "test"], "voc has only train and val"),
        ([tmp_path / "voc", *task, "--unlabelled"], "unlabelled: is for classification"),
    ):
        source, *others = map(str, arguments)
        assert main([source, str(tmp_path / "x.beton"), *others]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match=r"val\.txt: line 1 leads outside"):
        open_pairs(tmp_path / "voc", split="val")
    (tmp_path / "voc/SegmentationClass/2007_000000.png").unlink()
    with pytest.raises(ValueError, match=r"2007_000000\.png: no such file, which line 2 of .*train\.txt names"):
        open_pairs(tmp_path / "voc")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_masks_of_dataset_objects_are_checked(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    for mask, said in (
        (np.zeros((6, 4), int), r"its mask is int64 \[6, 4\], not integers \[4, 6\] as its image"),
        (np.zeros((4, 6)), r"its mask is float64"),
        (np.full((4, 6), 256), r"its mask has class 256, of 255 and 255"),
        (np.full((4, 6), -1), r"its mask has class -1"),
    ):
        with pytest.raises(ValueError, match=said):
            write([{"image": image, "mask": mask}], tmp_path / "x.beton", progress=False)
    with pytest.raises(ValueError, match=r"its mask has class 2, of 2 and 255"):
        write([{"image": image, "mask": np.full((4, 6), 2)}], tmp_path / "x.beton", mask_classes="ab", progress=False)
    side = write([{"image": image, "mask": np.full((4, 6), 2)}], tmp_path / "x.beton", progress=False)
    assert side["mask_classes"] == ["0", "1", "2"] and side["pixels"] == [0, 0, 24] and side["unlabelled"] == 0
    write([(image, 1)], tmp_path / "y.beton", progress=False)
    with pytest.raises(ValueError, match=r"y\.beton: has no masks; write it with .* --task segmentation"):
        train_loader(tmp_path / "y.beton", image_size=4, batch_size=1, masks=True)


def test_a_damaged_mask_is_named(blocks, tmp_path):
    path, index = tmp_path / "x.beton", 17
    content = bytearray(blocks.read_bytes())
    item = Blocks()[index]
    runs = encode_runs(item["mask"].astype(np.uint8)).tobytes()
    at = content.index(item["image"].tobytes()) + item["image"].size
    assert content[at : at + len(runs)] == runs  # behind its image
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.beton: the mask of image 17 is damaged; write it again"):
        list(original_loader(path, batch_size=1, indices=np.array([17]), **SAME).epoch())
