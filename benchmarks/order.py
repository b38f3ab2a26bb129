"""The windowed order against FFCV's random and quasi-random: `make bench-order` (root, control groups v1).

Reading: a file of JPEGs is read with the page cache held to a share of its size by a control group, from the disk as it
is and from one held to the operations and bytes a second of a hard disk. All decode by the same pipeline; rounds are
interleaved; figures are medians. Shuffling: orders of a file of ImageNet's shape, sorted by class; nothing is read.
"""

import argparse
import contextlib
import gc
import itertools
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader import OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.transforms import ToTensor
from ffcv.traversal_order.quasi_random import generate_order_inner

from benchmarks.common import ROOT, markdown
from data import epoch_order, train_loader, windowed_order
from data.order import RUN_BYTES
from data.write import write

PAGE = 8 << 20  # FFCV's, as data.write makes them
SIZE = 128  # pixels of a view
SLACK = 64 << 20  # for what a process allocates once it runs
MEMORY, BLKIO = (Path("/sys/fs/cgroup") / kind / f"bench-order-{os.getpid()}" for kind in ("memory", "blkio"))


class Pictures:
    """Noisy pictures of 256 x 256 pixels, 100 classes in turn, each a run: as a folder of classes is written."""

    classes = tuple(f"class {number}" for number in range(100))

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        noise = np.random.default_rng(index).integers(0, 256, (112, 112, 3), dtype=np.uint8)
        return cv2.resize(noise, (256, 256)), index * len(self.classes) // self.count


def main() -> None:
    """Both tables; or one measuring process of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8_000, help="in the file, about 42 KB each")
    parser.add_argument("--cache", type=float, default=0.3, help="page cache, as a share of the file")
    parser.add_argument("--window", type=int, default=48, help="MiB, of our order; FFCV's takes as many pages")
    parser.add_argument("--iops", type=int, default=300, help="reads a second of the slow disk")
    parser.add_argument("--mbps", type=int, default=200, help="megabytes a second of the slow disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="an epoch is left when they are over")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(**options.worker)
    print(shuffling())
    with tempfile.TemporaryDirectory(dir=".") as folder, control_groups():
        path = Path(folder) / "pictures.beton"
        write(Pictures(options.images), path, raw_share=0, workers=2, progress=False)
        drop_cache(path)  # what is cached from now on counts against the group
        started = {}
        try:
            start(started, path, options.window, options.seconds)
            for disk, iops, mbps in (("The disk as it is", 0, 0), ("A slow disk", options.iops, options.mbps)):
                throttle(path, iops, mbps * 10**6)
                print(f"\n{disk}" + (f", {iops} reads/s, {mbps} MB/s" if iops else "") + "\n")
                print(reading(path, started, options), flush=True)
        finally:
            for process in itertools.chain(*started.values()):
                process.kill()
                process.wait()


def start(started: dict[str, list[subprocess.Popen]], path: Path, window: int, seconds: float) -> None:
    """Starts the measuring processes of each order, in the control groups, and waits until they are ready to read."""
    quasi = {"kind": "quasi", "batch": window * 2**20 // PAGE // 2}  # FFCV holds 2 x batch pages open
    ours = {"kind": "windowed", "batch": 256, "window": window}
    kinds = {
        "FFCV random": [{"kind": "random", "batch": 256}],
        "FFCV random, its map without read-around": [{"kind": "random", "batch": 256, "read_around": False}],
        f"FFCV quasi-random, {window} MiB of pages": [quasi],
        f"windowed, {window} MiB": [ours],
        f"windowed, {window} MiB, 2 ranks": [ours | {"rank": rank, "world_size": 2} for rank in range(2)],
    }

    def enter() -> None:
        for group in (MEMORY, BLKIO):
            (group / "cgroup.procs").write_text(str(os.getpid()))

    env, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    for name, workers in kinds.items():
        started[name] = []
        for worker in workers:
            given = json.dumps(worker | {"path": str(path.resolve()), "seconds": seconds})
            command = [sys.executable, "-m", "benchmarks.order", "--worker", given]
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True, preexec_fn=enter)
            started[name].append(process)
            answer(process)


def reading(path: Path, started: dict[str, list[subprocess.Popen]], options: argparse.Namespace) -> str:
    """A table: images per second and bytes read, by order."""
    speeds, amounts = ({name: [] for name in started} for _ in range(2))
    for _ in range(options.rounds):
        for name, processes in started.items():
            limit_cache(path, options.cache, len(processes))
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            done = [json.loads(answer(process)) for process in processes]
            images = sum(result["images"] for result in done)
            speeds[name].append(images / max(result["seconds"] for result in done))
            amounts[name].append(sum(result["read"] for result in done) / images)
    stored, rows = path.stat().st_size / options.images, []
    for name in started:
        speed, amount = statistics.median(speeds[name]), statistics.median(amounts[name])
        ratio = speed / statistics.median(speeds["FFCV random"])
        rows.append([name, f"{speed:,.0f}", f"{ratio:.1f}", f"{amount / 1000:,.0f}", f"{amount / stored:.2f}"])
    return markdown(["order", "images/s", "against FFCV random", "KB read an image", "of its size"], rows)


def limit_cache(path: Path, share: float, running: int) -> None:
    """Empties the cache, and lets the group have what its processes take, and `share` of the file for caching."""
    (MEMORY / "memory.limit_in_bytes").write_text("-1")
    drop_cache(path)
    (MEMORY / "memory.force_empty").write_text("0")
    usage = int((MEMORY / "memory.usage_in_bytes").read_text())
    (MEMORY / "memory.limit_in_bytes").write_text(str(usage + running * SLACK + int(share * path.stat().st_size)))


def drop_cache(path: Path) -> None:
    """Takes a file out of the page cache, but for what a process maps."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answer(process: subprocess.Popen) -> str:
    """The next line of a measuring process."""
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"error: {process.args}: ended early, out of the group's memory?")
    return line


def work(
    path: str, seconds: float, kind: str, batch: int, window: int = 0, rank: int = 0, world_size: int = 1,
    read_around: bool = True,
) -> None:  # fmt: skip
    """A measuring process: for each line that comes, reads an epoch and says what it took."""
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    if kind == "windowed":
        loader = train_loader(
            path, image_size=SIZE, batch_size=batch, order=kind, window=window, workers=threads, rank=rank,
            world_size=world_size,
        )  # fmt: skip
    else:
        order = OrderOption.QUASI_RANDOM if kind == "quasi" else OrderOption.RANDOM
        loader = FFCVLoader(
            path, batch, threads, order=order, os_cache=kind == "random", seed=0, batches_ahead=2,
            pipelines={"image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), ToTensor()], "label": None},
        )  # fmt: skip
        if not read_around:
            loader.memory_manager.context.__enter__()
            loader.memory_manager.context.mmap._mmap.madvise(mmap.MADV_RANDOM)
    for number in itertools.count():
        before, images, since = bytes_read(), 0, time.perf_counter()
        if kind == "windowed":  # as its own `epoch` does, without normalising, which FFCV is not asked for either
            epoch = EpochIterator(loader._pipeline, np.concatenate(loader._shares.of(number, 0)[0]).astype(np.uint64))
        else:
            epoch = iter(loader)
        for values in epoch:
            images += len(values[0])
            if number == 0 or time.perf_counter() - since > seconds:  # the first compiles
                break
        elapsed, read = time.perf_counter() - since, bytes_read() - before
        epoch.close()
        del epoch
        gc.collect()
        time.sleep(1)  # until FFCV's threads have ended and given their memory back
        print(json.dumps({"images": images, "seconds": elapsed, "read": read}), flush=True)
        if not sys.stdin.readline():
            break
    os._exit(0)  # without waiting for FFCV's threads


def bytes_read() -> int:
    """Bytes that this process had the disk read."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


@contextlib.contextmanager
def control_groups():
    """Makes and removes the two groups."""
    try:
        for group in (MEMORY, BLKIO):
            group.mkdir()
    except OSError as error:
        raise SystemExit(f"error: {error}; the benchmark needs root and control groups v1") from error
    try:
        yield
    finally:
        for group in (MEMORY, BLKIO):
            group.rmdir()


def throttle(path: Path, iops: int, bps: int) -> None:
    """Holds the disk of `path` to so many reads and bytes a second, for processes in the group; 0: no limit."""
    device = os.stat(path).st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    disk = disk.parent if (disk / "partition").exists() else disk
    for name, value in (("iops", iops), ("bps", bps)):
        (BLKIO / f"blkio.throttle.read_{name}_device").write_text(f"{(disk / 'dev').read_text().strip()} {value}")


def shuffling(count: int = 1_281_167, classes: int = 1000, size: int = 110_000, batch: int = 1024) -> str:
    """A table: how well each order mixes a file of ImageNet's shape whose classes come one after the other."""
    label = np.arange(count) * classes // count
    begin = np.cumsum(np.random.default_rng(0).integers(size // 2, size * 3 // 2, count))
    orders = {"random": (epoch_order(count, 0, 0), begin, 0)}
    pages, runs = begin // PAGE, begin // RUN_BYTES
    for window in (2048, 16384):
        orders[f"windowed, {window} MiB"] = (
            windowed_order(runs, 0, 0, batch, window * 2**20 // RUN_BYTES),
            runs,
            RUN_BYTES,
        )
    orders["FFCV quasi-random"] = quasi_random(pages, 2 * batch), pages, PAGE
    rows = []
    for name, (order, parts, bytes_each) in orders.items():
        order = order[: count // batch * batch]
        place = np.full(count, -1)
        place[order] = np.arange(len(order)) // batch
        neighbours = np.mean((place[1:] == place[:-1]) & (place[1:] >= 0))
        mixes = [
            np.bincount(label[part], minlength=classes) for part in order.reshape(-1, batch)[:: count // batch // 200]
        ]
        distance = np.mean([np.abs(mix / batch - 1 / classes).sum() / 2 for mix in mixes])
        seen = np.mean([np.count_nonzero(mix) for mix in mixes])
        held = f"{open_parts(parts[order]) * bytes_each / 2**30:.1f}" if bytes_each else f"all, {begin[-1] / 2**30:.0f}"
        rows.append([name, held, f"{100 * neighbours:.2f}", f"{seen:.0f}", f"{distance:.3f}"])
    head = ["order", "GiB in use", "file neighbours in one batch (%)", "classes a batch", "distance of class mix"]
    return markdown(head, rows)


def quasi_random(pages: np.ndarray, open_pages: int) -> np.ndarray:
    """FFCV's order, by its own function."""
    sizes = np.bincount(pages)
    table = np.zeros((len(sizes), sizes.max()), dtype=np.int64)
    table[pages, np.arange(len(pages)) - (np.cumsum(sizes) - sizes)[pages]] = np.arange(len(pages))
    order = np.zeros(len(pages), dtype=np.int64)
    generate_order_inner(0, table, sizes, order, open_pages)
    return order


def open_parts(taken: np.ndarray) -> float:
    """Pages or runs that are begun and not done with, the mean over an epoch; `taken`: the part of each sample."""
    first = np.unique(taken, return_index=True)[1]
    last = len(taken) - 1 - np.unique(taken[::-1], return_index=True)[1]
    return float(np.sum(last + 1 - first) / len(taken))


if __name__ == "__main__":
    main()
