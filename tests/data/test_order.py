"""The windowed order and its reading: once per epoch, in long runs, within a window, the same at any world size."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from data import choose_order, train_loader, windowed_order
from data.beton import open_checked
from data.memory import memory_limit
from data.order import CACHED_SHARE, RUN_BYTES, WINDOW, lane_count
from data.read_ahead import RunReader
from data.write import write

SIDE, COUNT = 160, 1100  # raw images of 76,800 bytes: 84 MB in 11 pages, 41 runs
SETTINGS = {"image_size": SIDE, "batch_size": 24, "seed": 3, "workers": 1, "order": "windowed", "window": 16}
SAME_VIEW = {"scale": (1, 1), "ratio": (1, 1), "hflip": 0.0, "mean": (0, 0, 0), "std": (1, 1, 1)}


class Numbered:
    """Images that tell their number: each a random pattern of its own."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), index // 100


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("order") / "numbered.beton"
    write(Numbered(), path, raw_share=1.0, progress=False)
    return path


@pytest.fixture(scope="module")
def train(beton):
    return train_loader(beton, **SETTINGS, **SAME_VIEW)


@pytest.fixture(scope="module")
def reference(train):
    return list(train.epoch(1))


def uneven_runs(count: int = 500, seed: int = 0) -> np.ndarray:
    """int64 [samples]: `count` runs of 5 to 40 samples, numbered in the file's order with gaps."""
    return np.repeat(3 * np.arange(count), np.random.default_rng(seed).integers(5, 41, count))


@pytest.mark.parametrize(("batch_size", "window"), [(64, 128), (96, 32), (7, 64), (250, 2), (8, 1), (1, 1000)])
def test_every_sample_comes_once(batch_size, window):
    runs = uneven_runs()
    orders = [windowed_order(runs, seed, epoch, batch_size, window) for seed in range(2) for epoch in range(2)]
    for order in orders:
        assert order.dtype == np.int64 and len(order) == len(runs) // batch_size * batch_size
        assert len(np.unique(order)) == len(order) and order.min() >= 0 and order.max() < len(runs)
    assert len({order.tobytes() for order in orders}) == 4
    assert_array_equal(orders[3], windowed_order(runs.copy(), 1, 1, batch_size, window))


def test_what_is_left_out_changes_with_the_epoch():
    runs = uneven_runs(20)
    left = [set(range(len(runs))) - set(windowed_order(runs, 0, epoch, 64, 8)) for epoch in range(20)]
    assert all(len(samples) == len(runs) % 64 > 0 for samples in left)
    assert not set.intersection(*left)


def test_the_order_is_the_same_on_every_machine():
    order = windowed_order(np.repeat(np.arange(4), 3), 0, 0, 4, 4)
    assert order.tolist() == [9, 2, 11, 1, 3, 0, 10, 6, 5, 7, 4, 8]


def open_runs(runs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int64 [len(order)]: runs that are begun and not yet done with, at each sample."""
    taken = runs[order]
    first = np.unique(taken, return_index=True)[1]
    last = len(taken) - 1 - np.unique(taken[::-1], return_index=True)[1]
    change = np.zeros(len(taken) + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    return np.cumsum(change)[:-1]


@pytest.mark.parametrize("window", [8, 32, 128])
def test_the_window_bounds_what_is_open(window):
    """A sample comes neither earlier nor later than the window allows: its run is open for a while only."""
    runs = np.repeat(np.arange(2000), 20)
    opened = open_runs(runs, windowed_order(runs, 0, 0, 32, window))
    assert 0.5 * window < opened.mean() < 1.1 * window + 2
    assert opened.max() <= window + lane_count(32, window) + 2
    uneven = uneven_runs(2000)
    assert open_runs(uneven, windowed_order(uneven, 0, 0, 32, window)).max() < 2 * window + 32


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_read_different_runs(world_size):
    runs = uneven_runs(3000)
    order = windowed_order(runs, 0, 0, 96, 256)
    ranks = [np.unique(runs[part]) for part in order.reshape(-1, world_size, 96 // world_size).swapaxes(0, 1)]
    twice = sum(map(len, ranks)) - len(np.unique(runs[order]))
    assert twice <= world_size - 1  # the runs that lie across a cut


def test_it_mixes_within_the_window():
    runs = np.repeat(np.arange(2000), 20)
    order = windowed_order(runs, 0, 0, 64, 256)
    place = np.empty(len(runs), int)
    place[order] = np.arange(len(order))
    batch = place // 64
    inside = runs[1:] == runs[:-1]
    together = np.mean((batch[1:] == batch[:-1])[inside])  # neighbours in the file
    assert together < 3 / 80  # were the window shuffled as a whole, 1 / 80: 256 runs of 20 are 80 batches of 64
    beside = runs[order].reshape(-1, 2)
    assert np.mean(beside[:, 0] == beside[:, 1]) < 2 / 256  # pairs, as mixup takes them
    # Whole runs go anywhere in the epoch.
    first = np.array([place[runs == run].min() for run in range(0, 2000, 10)])
    assert abs(np.corrcoef(np.arange(200), first)[0, 1]) < 0.25


def test_images_are_the_ones_asked_for(train, reference):
    index = torch.cat([batch["index"] for batch in reference])
    assert len(index) == len(index.unique()) == COUNT // 24 * 24
    for batch in reference[::9]:
        for i, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            stored = torch.from_numpy(Numbered()[i][0]).permute(2, 0, 1)
            assert torch.equal((image * 255).round().to(torch.uint8), stored)


def test_global_batches_are_the_same_at_any_world_size(beton, reference):
    for world_size, accumulate in ((2, 1), (2, 3), (4, 2), (3, 1)):
        loaders = [
            train_loader(beton, **SETTINGS, **SAME_VIEW, rank=rank, world_size=world_size, accumulate=accumulate)
            for rank in range(world_size)
        ]
        shares = [np.concatenate(loader._shares.of(1, 0)[0]).reshape(loader.steps_per_epoch, -1) for loader in loaders]
        assert_array_equal(np.concatenate(shares, axis=1), np.stack([batch["index"] for batch in reference]))


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a
    )


@pytest.mark.parametrize("start", [1, 20, 44])
def test_an_epoch_goes_on_where_it_was_cut(train, reference, start):
    batches = train.epoch(1, start)
    assert same([next(batches) for _ in range(start, min(start + 4, 45))], reference[start : start + 4])


def mapped_bytes(path: Path) -> int:
    """Bytes of the file that this process has mapped and in memory, over all its maps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_memory_is_given_back(beton, train, reference):
    """Only the window is held, whichever the epoch, and nothing between epochs."""
    train.close()
    for epoch in range(2):
        held = [mapped_bytes(beton) for number, _ in enumerate(train.epoch(epoch)) if number % 5 == 4]
        # 8 runs of 2 MiB, a run a lane more, what two batches ahead began, and the kernel's mapping around a fault
        assert max(held) < beton.stat().st_size / 2 and np.mean(held) < 28 << 20
    train.close()
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(beton))]
    assert len(maps) <= 1  # of the epoch that ended last


def test_leaving_early_leaves_no_threads_or_files(train, reference):
    train.close()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for taken in (1, 3, 45):
        batches = train.epoch(1)
        for _ in range(taken):
            next(batches)
        batches.close()
        train._shares._next[1].join()
        assert threading.active_count() == before[0]
        assert len(os.listdir("/proc/self/fd")) <= before[1] + 1  # the map of the last epoch holds one
    abandoned = train.epoch(1)
    next(abandoned)
    assert same([next(train.epoch(1))], reference[:1])
    train.close()
    assert threading.active_count() == before[0]


def test_leaving_early_decodes_no_further(train):
    batches, decoded = train.epoch(1), []
    next(batches)
    decode = train._running.run_pipeline
    train._running.run_pipeline = lambda *batch: decoded.append(batch) or decode(*batch)
    batches.close()
    assert len(decoded) < 10 < train.steps_per_epoch - 10


def test_a_file_that_shrinks_is_an_error(beton, tmp_path):
    path = tmp_path / "copy.beton"
    path.write_bytes(beton.read_bytes())
    columns = open_checked(path)[1]
    os.truncate(path, path.stat().st_size // 2)
    reader = RunReader(path, [(columns["image"], columns["image_bytes"])], 4)
    context = reader.schedule_epoch([np.arange(COUNT, dtype=np.uint64)])
    with context, pytest.raises(OSError, match=r"copy\.beton: became shorter while it was read"):
        context.start_batch(0)


def test_runs_cover_the_images(beton):
    columns = open_checked(beton)[1]
    images = columns["image"].astype(int)
    reader = RunReader(beton, [(columns["image"], columns["image_bytes"])], 4)
    assert (reader.begin[reader.runs] <= images).all()
    assert (images + 3 * SIDE * SIDE <= reader.end[reader.runs]).all()
    inside = reader.end > 0
    assert (reader.end - reader.begin)[inside].max() < RUN_BYTES + 3 * SIDE * SIDE


def control_group(root: Path, line: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"4:cpu,cpuacct:/elsewhere\n{line}\n")
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(f"{text}\n")
    return root


MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED_V1 = "9223372036854771712"


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "3000000"}, 3_000_000),
        ("0::/job/step", {"job/step/memory.max": "2000000", "job/memory.max": "3000000"}, 2_000_000),
        ("0::/", {"memory.max": "max"}, MACHINE),
        ("7:memory:/slurm/job_1", {"memory/slurm/job_1/memory.limit_in_bytes": "5000000"}, 5_000_000),
        ("7:memory:/docker/abc", {"memory/memory.limit_in_bytes": "4000000"}, 4_000_000),  # the container's own root
        ("7:memory:/", {"memory/memory.limit_in_bytes": UNLIMITED_V1}, MACHINE),
        ("4:cpuset:/x", {"x/memory.limit_in_bytes": "1000000"}, MACHINE),
    ],
)
def test_the_memory_of_a_control_group_counts(tmp_path, line, files, limit):
    assert memory_limit(control_group(tmp_path, line, files)) == limit


def test_without_control_groups_the_machine_counts(tmp_path):
    assert memory_limit(tmp_path) == MACHINE >= memory_limit()


def test_the_order_is_chosen_by_the_size_of_the_file(beton, tmp_path):
    assert choose_order(beton, "auto") == ("random", min(WINDOW, memory_limit() >> 22))
    with open(tmp_path / "large.beton", "wb") as file:
        file.truncate(int(memory_limit() * CACHED_SHARE) + 1)  # takes no room on the disk
        assert choose_order(file.name, "auto", 7) == ("windowed", 7)
        assert choose_order(file.name, "random") == ("random", choose_order(beton, "auto")[1])
        file.truncate(int(memory_limit() * CACHED_SHARE) - 1)
        assert choose_order(file.name, "auto", 7) == ("random", 7)
    assert choose_order(beton, "windowed", 5) == ("windowed", 5)


@pytest.mark.parametrize(("setting", "value"), [("order", "sorted"), ("window", 0)])
def test_bad_settings_are_refused(beton, setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}: must be"):
        train_loader(beton, **{**SETTINGS, setting: value})
