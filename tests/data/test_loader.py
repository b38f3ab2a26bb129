"""Loading: order and views are pure functions, every image counts once, damaged files are refused before use."""

import os
import shutil
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ffcv.fields import rgb_image
from ffcv.loader import epoch_iterator
from ffcv.reader import Reader
from torch.utils._python_dispatch import TorchDispatchMode

from data import decode, epoch_order, eval_loader, inspect, resolve, train_loader
from data.augment import centre_view, random_view
from data.beton import TICK, open_checked, side_file
from data.compiled import compiled
from data.pipeline import AHEAD
from data.write import write

COUNT = 97  # a prime: divides into no batch and no number of ranks
SETTINGS = {"image_size": 32, "batch_size": 8, "seed": 3}


class Pictures:
    """Smooth random pictures of many sizes, half of them stored as JPEG."""

    classes = ("ant", "bee", "cat")

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        rng = np.random.default_rng(index)
        size = tuple(int(side) for side in rng.integers(40, 90, 2))
        noise = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
        return cv2.resize(noise, size, interpolation=cv2.INTER_LINEAR), index % 3


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "pictures.beton"
    write(Pictures(), path, smart_threshold=3 * 64 * 64, progress=False)
    return path


@pytest.fixture(scope="module")
def train(beton):
    return train_loader(beton, **SETTINGS, workers=2)


@pytest.fixture(scope="module")
def evaluate(beton):
    return eval_loader(beton, image_size=32, batch_size=10)


@pytest.fixture(scope="module")
def reference(train):
    return list(train.epoch(1))


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def test_batches(train, reference):
    assert train.num_samples == COUNT and train.classes == list(Pictures.classes) and train.has_labels
    assert len(reference) == train.steps_per_epoch == len(train) == COUNT // 8
    batch = reference[0]
    assert batch["image"].shape == (8, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    index = torch.cat([batch["index"] for batch in reference])
    assert index.dtype == torch.int64 and len(index.unique()) == len(index) == 96
    assert torch.equal(torch.cat([batch["label"] for batch in reference]), index % 3)
    assert np.array_equal(index.numpy(), epoch_order(COUNT, 3, 1)[:96])


def test_an_epoch_comes_again_to_the_bit(train, reference):
    assert same(list(train.epoch(1)), reference)
    other = list(train.epoch(2))
    assert not torch.equal(other[0]["index"], reference[0]["index"])
    assert same(list(train.epoch(1)), reference)


@pytest.mark.parametrize("start", [1, 7, 12])
def test_start_cuts_the_epoch(train, reference, start):
    assert same(list(train.epoch(1, start)), reference[start:])


def test_views_do_not_depend_on_workers_ranks_or_accumulation(beton, reference):
    loaders = [train_loader(beton, **SETTINGS, accumulate=2, rank=rank, world_size=2, workers=1) for rank in range(2)]
    assert [loader.micro_batch_size for loader in loaders] == [2, 2]
    first, second = (list(loader.epoch(1)) for loader in loaders)
    assert len(first) == len(second) == 2 * len(reference)
    for step, batch in enumerate(reference):  # the same global batches, cut into other pieces
        pieces = [ranks[2 * step + micro] for ranks in (first, second) for micro in range(2)]
        for key in batch:
            assert torch.equal(torch.cat([piece[key] for piece in pieces]), batch[key])
    assert same(list(loaders[1].epoch(1, start=9)), second[18:])


def test_another_epoch_shows_another_view(train, reference):
    views = {int(i): image for batch in reference for i, image in zip(batch["index"], batch["image"], strict=True)}
    other = {int(i): image for batch in train.epoch(2) for i, image in zip(batch["index"], batch["image"], strict=True)}
    shared = views.keys() & other.keys()
    assert len(shared) > 90 and not any(torch.equal(views[index], other[index]) for index in shared)


def test_batches_stay_valid(train):
    kept, copies = [], []
    for batch in train.epoch(4):
        kept.append(batch)
        copies.append({key: value.clone() for key, value in batch.items()})
    assert same(kept, copies)


def test_leaving_early_leaves_no_threads(train, reference):
    before = threading.active_count()
    for taken in (1, 2, 11):  # full queue, and the end mark waiting behind it
        batches = train.epoch(1)
        for _ in range(taken):
            next(batches)
        batches.close()
        train._shares._next[1].join()
        assert threading.active_count() == before
    abandoned = train.epoch(1)
    next(abandoned)
    assert same(list(train.epoch(1)), reference)
    with pytest.raises(RuntimeError, match="this epoch was ended"):
        next(abandoned)
    assert threading.active_count() == before


def test_the_next_order_is_built_meanwhile(beton, reference):
    loader = train_loader(beton, **SETTINGS, workers=1)
    batches = loader.epoch(0)
    next(batches)
    epoch, thread, made = loader._shares._next
    thread.join()
    assert epoch == 1 and len(made) == 1
    assert same(list(loader.epoch(1)), reference) and loader._shares._next[0] == 2
    assert same(list(loader.epoch(1, 5)), reference[5:])  # a part of it is not what was prepared


@pytest.mark.parametrize("launched", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_a_rank_decodes_with_its_share_of_the_cores(beton, monkeypatch, launched):
    cores = len(os.sched_getaffinity(0))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for ranks in (1, 2, 8):
        monkeypatch.setenv(launched, str(ranks))
        loader = eval_loader(beton, image_size=32, batch_size=10)
        assert loader._pipeline.num_workers == max(1, cores // ranks)


def test_decoding_asks_for_no_gpu(train):
    """FFCV's thread would make a context on GPU 0 for every rank."""
    assert not epoch_iterator.IS_CUDA
    batches = train.epoch(0)
    next(batches)
    assert train._running.cuda_streams == [None] * (AHEAD + 2)
    train.close()


def test_tables_are_read_once(beton, tmp_path, monkeypatch):
    read, path = [], tmp_path / "copy.beton"
    for source, copy in ((beton, path), (side_file(beton), side_file(path))):
        shutil.copy(source, copy)
    time.sleep(2 * TICK / 1e9)
    monkeypatch.setattr("data.beton.Reader", lambda name: read.append(name) or Reader(name))
    first = inspect(path)
    loaders = [train_loader(path, **SETTINGS, workers=1), eval_loader(path, image_size=32, batch_size=10)]
    assert read == [path] and all(loader.info is first for loader in loaders)
    os.utime(side_file(path))
    time.sleep(2 * TICK / 1e9)
    assert inspect(path) == first and read == [path, path]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        inspect(path)


def twice(x):
    return 2 * x


def test_compiled_code_is_kept_and_damage_to_it_mended(beton, tmp_path, monkeypatch):
    def loaded(function, *args) -> int:
        """How often a fresh start finds `function` compiled."""
        made = compiled(function, parallel=False)
        made(*args)
        return sum(made.stats.cache_hits.values())

    monkeypatch.setattr("data.compiled.folder", lambda: tmp_path)
    assert [loaded(twice, 1), loaded(twice, 1), loaded(twice, 1.0)] == [0, 1, 0]
    for file in tmp_path.rglob("*.nb?"):
        file.write_bytes(file.read_bytes()[:50])
    assert [loaded(twice, 1), loaded(twice, 1)] == [0, 1]
    shutil.rmtree(tmp_path)
    tmp_path.write_text("not a folder")
    assert [loaded(twice, 1), loaded(twice, 1)] == [0, 0]
    monkeypatch.undo()

    kept = []
    for _ in range(2):
        monkeypatch.setattr("data.decode._one_thread", again := compiled(decode._decode, parallel=False))
        kept.append(next(eval_loader(beton, image_size=32, batch_size=10, workers=1).epoch()))
    assert sum(again.stats.cache_hits.values()) == 1 and same(*([one] for one in kept))


def test_torch_keeps_its_threads(train):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        next(train.epoch(0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
        train.close()


def test_evaluation_counts_every_image_once(beton, evaluate):
    alone = list(evaluate.epoch())
    assert [len(batch["valid"]) for batch in alone] == [10] * 9 + [7]
    assert all(batch["valid"].all() for batch in alone)
    assert torch.equal(torch.cat([batch["index"] for batch in alone]), torch.arange(COUNT))
    images = torch.cat([batch["image"] for batch in alone])

    ranks = [
        list(eval_loader(beton, image_size=32, batch_size=10, rank=rank, world_size=3, workers=1).epoch())
        for rank in range(3)
    ]
    assert len({tuple(len(batch["valid"]) for batch in batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    valid = torch.cat([batch["valid"] for batch in batches])
    index = torch.cat([batch["index"] for batch in batches])
    assert len(valid) == 99 and torch.equal(index[valid].sort().values, torch.arange(COUNT))
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), images[index])
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), index % 3)


def test_more_ranks_than_images(tmp_path):
    write([(np.zeros((8, 8, 3), np.uint8), 1)], tmp_path / "one.beton", progress=False)
    loader = eval_loader(tmp_path / "one.beton", image_size=8, batch_size=4, rank=1, world_size=2)
    (batch,) = loader.epoch()
    assert batch["valid"].tolist() == [False] and batch["index"].tolist() == [0]


def test_pixels_are_cropped_resized_and_normalised(tmp_path):
    wide, exact = Pictures()[0][0], Pictures()[1][0][:32, :32]
    small = exact[:16, :16].copy()
    write([wide, exact, small], tmp_path / "x.beton", raw_share=1, progress=False)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    loader = eval_loader(tmp_path / "x.beton", image_size=32, batch_size=3, mean=mean, std=std)
    assert not loader.has_labels and loader.classes is None
    (batch,) = loader.epoch()
    assert "label" not in batch
    pixels = batch["image"] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    pixels = (pixels * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels[1] - exact).max() < 1e-3  # an image of the right size comes through unchanged
    height, width, _ = wide.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    shrunk = cv2.resize(wide[top : top + side, left : left + side], (32, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels[0] - shrunk).max() <= 1.01
    enlarged = cv2.resize(small, (32, 32), interpolation=cv2.INTER_LINEAR)
    assert np.abs(pixels[2] - enlarged).max() <= 1.01


def test_flip_and_dtype(tmp_path):
    image = Pictures()[1][0][:33, :33]
    write([image], tmp_path / "x.beton", raw_share=1, progress=False)
    loader = train_loader(
        tmp_path / "x.beton", image_size=33, batch_size=1, scale=(1, 1), ratio=(1, 1), hflip=1.0,
        mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.bfloat16,
    )  # fmt: skip
    (batch,) = loader.epoch()
    assert batch["image"].dtype == torch.bfloat16
    expected = torch.from_numpy(image[:, ::-1].copy()).permute(2, 0, 1) / 255
    assert torch.equal(batch["image"][0], expected.to(torch.bfloat16))


class Photos(Pictures):
    """Large enough for a crop to need a part of them; with masks."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        rng = np.random.default_rng(index)
        height, width = (int(side) for side in rng.integers(100, 250, 2))
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), (width, height))
        return image, rng.integers(0, 3, (height, width), dtype=np.uint8)


def test_parts_of_jpegs_give_the_batches_of_whole_ones(tmp_path, monkeypatch):
    """For each kind of view: a file as it is written, and one whose JPEGs have no restart markers."""
    for name in ("parts", "whole"):
        write(Photos(), tmp_path / f"{name}.beton", raw_share=0, mask_classes=["a", "b", "c"], progress=False)
        monkeypatch.setattr("data.write.pages.encode", rgb_image.encode_jpeg)
    parts, whole = (open_checked(tmp_path / f"{name}.beton")[1]["image_bytes"] for name in ("parts", "whole"))
    assert (parts > whole).all()
    training = {"image_size": 32, "batch_size": 8, "seed": 3}
    for make in (
        lambda path: train_loader(path, **training, workers=1),
        lambda path: train_loader(path, **training, workers=1, masks=True),
        lambda path: eval_loader(path, image_size=32, batch_size=10, crop_pct=0.8, workers=1),
    ):
        parts, whole = (list(make(tmp_path / f"{name}.beton").epoch(1)) for name in ("parts", "whole"))
        assert same(parts, whole)


@pytest.mark.parametrize("size", [(300, 400), (31, 7), (1, 1), (2, 900)])
def test_views_lie_in_the_image(size):
    height, width = size
    for index in range(500):
        top, left, h, w, _ = random_view(1, 2, index, height, width, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
        assert top >= 0 and left >= 0 and h > 0 and w > 0 and top + h <= height and left + w <= width
    top, left, h, w, flip = centre_view(height, width, 1.0, 0.875)
    assert h == w == max(1, int(min(size) * 0.875)) and not flip
    assert abs(2 * top + h - height) <= 1 and abs(2 * left + w - width) <= 1


def test_views_are_spread_as_asked():
    views = np.array([random_view(0, 0, i, 500, 500, (0.2, 0.6), (3 / 4, 4 / 3), 0.5) for i in range(5000)], float)
    top, left, h, w, flip = views.T
    area, aspect = h * w / 500**2, w / h
    assert area.min() > 0.195 and area.max() < 0.605 and abs(area.mean() - 0.4) < 0.01
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and abs(np.log(aspect).mean()) < 0.01
    assert abs(flip.mean() - 0.5) < 0.03
    assert abs((top / (500 - h)).mean() - 0.5) < 0.02 and abs((left / (500 - w)).mean() - 0.5) < 0.02
    assert abs(np.corrcoef(flip, area)[0, 1]) < 0.05
    other = np.array([random_view(0, 1, i, 500, 500, (0.2, 0.6), (3 / 4, 4 / 3), 0.5) for i in range(1000)], float)
    assert abs(np.corrcoef(other[:, 0], top[:1000])[0, 1]) < 0.1


def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 9
    assert orders[0].dtype == np.int64 and np.array_equal(orders[4], epoch_order(1000, 1, 1))
    assert epoch_order(10, 0, 0).tolist() == [8, 0, 3, 7, 6, 4, 1, 5, 2, 9]  # on every machine and numpy


def test_info(beton):
    info = inspect(beton)
    assert (info.num_samples, info.has_labels, info.has_masks, info.max_label) == (COUNT, True, False, 2)
    assert info.classes == list(Pictures.classes) and max(info.max_size) < 90
    assert resolve(str(beton), "train") == beton


def test_truncated_files_are_refused(beton, tmp_path):
    content = beton.read_bytes()
    path = tmp_path / "cut.beton"
    for size in [
        0,
        1,
        10,
        23,
        24,
        500,
        4000,
        len(content) // 2,
        len(content) - 2400,
        len(content) - 24,
        len(content) - 1,
    ]:
        path.write_bytes(content[:size])
        with pytest.raises(
            ValueError, match=r"cut\.beton: truncated, \d+ bytes of \d+ expected; write it again"
        ) as error:
            inspect(path)
        assert "\n" not in str(error.value)
    side_file(path).write_bytes(side_file(beton).read_bytes())
    with pytest.raises(ValueError, match=f"truncated, {len(content) - 1} bytes of {len(content)} expected"):
        train_loader(path, image_size=32, batch_size=8)


def test_garbage_is_refused(beton, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; write one with python -m data\.write"):
        inspect(tmp_path / "missing.beton")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        inspect(tmp_path)
    path = tmp_path / "x.beton"
    for content in (b"not a beton " * 1000, np.random.default_rng(0).bytes(100_000), b"\x02\x00" + b"\xff" * 99_998):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="write it again"):
            inspect(path)
    content = bytearray(beton.read_bytes())
    path.write_bytes(content[:16] + bytes(8) + content[24:])  # the table's place is written last
    with pytest.raises(ValueError, match="unfinished"):
        inspect(path)
    path.write_bytes(content[:8] + bytes(8) + content[16:])
    with pytest.raises(ValueError, match="no samples"):
        inspect(path)
    path.write_bytes(content + b"more")
    side_file(path).write_bytes(side_file(beton).read_bytes())
    with pytest.raises(ValueError, match="describes another file"):
        inspect(path)
    for text in ("{", "[1]", '{"bytes": "many"}', '{"classes": 3}'):
        side_file(path).write_text(text)
        with pytest.raises(ValueError, match="not such a file"):
            inspect(path)


def test_damaged_tables_never_pass_a_pointer_outside_the_file(beton, tmp_path):
    """Every byte of the tables may be hit: the file is refused, or what is left is safe to map."""
    content = beton.read_bytes()
    rng, path, refused = np.random.default_rng(0), tmp_path / "x.beton", 0
    path.write_bytes(content)
    table = int.from_bytes(content[16:24], "little")
    parts = [rng.integers(*part, 60) for part in ((24, 2200), (2200, 4000), (table, len(content)))]
    for place in np.concatenate([np.arange(24), *parts]).tolist():
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ 1 << int(rng.integers(8))]))
        try:
            info = inspect(path)
        except ValueError:
            refused += 1
        else:
            assert 0 < info.num_samples <= COUNT
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(content[place : place + 1])
    assert refused > 60


def test_a_damaged_jpeg_is_named(tmp_path):
    path = tmp_path / "x.beton"
    write([Pictures()[index][0] for index in range(4)], path, raw_share=0, progress=False)
    content = path.read_bytes()
    at = content.index(b"\xff\xd8\xff", content.index(b"\xff\xd8\xff") + 3)
    path.write_bytes(content[:at] + bytes(60) + content[at + 60 :])
    loader = eval_loader(path, image_size=32, batch_size=2)
    with pytest.raises(ValueError, match=r"image \d is damaged"):
        list(loader.epoch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9, "accumulate": 2}, "must be a positive multiple of 1 ranks x 2"),
        ({"batch_size": 0}, "positive multiple"),
        ({"batch_size": 98}, "97 samples do not fill one batch of 98"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"hflip": 2.0}, "hflip"),
        ({"seed": -1}, "seed"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5, float("nan"), 0.5)}, "must be three values each"),
        ({"mean": (123.675, 116.28, 103.53)}, r"not 0\.\.255: give mean \[0\.485, 0\.456, 0\.406\]"),
        ({"std": (58.395, 57.12, 57.375)}, r"not 0\.\.255: give std \[0\.229, 0\.224, 0\.225\]"),
        ({"indices": np.array([0, 97])}, r"indices 0\.\.97: must be in 0\.\.96"),
        ({"indices": np.array([0.5])}, r"indices: must be integers \[n\]"),
        ({"workers": 0}, "workers"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_bad_settings_are_refused(beton, settings, message):
    with pytest.raises(ValueError, match=message):
        train_loader(beton, **{**SETTINGS, **settings})


def test_part_of_a_file_is_shuffled(beton):
    chosen = np.arange(3, 97, 2)
    loader = train_loader(beton, **SETTINGS, indices=chosen, mean=[0.5] * 3, std=[0.5] * 3, workers=1)
    assert loader.num_samples == 47 and loader.steps_per_epoch == 5
    seen = torch.cat([batch["index"] for batch in loader.epoch(1)])
    assert np.array_equal(seen, chosen[epoch_order(47, 3, 1)[:40]])


def test_start_outside_the_epoch_is_refused(train):
    with pytest.raises(ValueError, match=r"start 13: must be in 0\.\.12"):
        train.epoch(0, 13)


class Copies(TorchDispatchMode):
    """Within it: `found`, whether each copy from the CPU to another device let the host go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].device.type == "cpu" and out.device.type != "cpu":
            self.found.append(kwargs.get("non_blocking", False))
        return out


def test_a_batch_comes_in_two_copies_that_nothing_waits_for(train, reference, monkeypatch) -> None:
    """The images, and index, label and key together. The other device here is torch's `meta`."""
    other = torch.device("meta")
    for name, value in {"device": other, "_mean": train._mean.to(other), "_std": train._std.to(other)}.items():
        monkeypatch.setattr(train, name, value)
    batches = train.epoch(1)
    with Copies() as copies:
        batch = next(batches)
    batches.close()
    assert copies.found == [True, True]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in reference[0].items()}
    assert all(value.is_meta for value in batch.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu(beton, reference):
    batches = list(train_loader(beton, **SETTINGS, device="cuda").epoch(1))
    for batch, expected in zip(batches, reference, strict=True):
        assert all(value.is_cuda for value in batch.values())
        assert torch.equal(batch["index"].cpu(), expected["index"])
        torch.testing.assert_close(batch["image"].cpu(), expected["image"])
