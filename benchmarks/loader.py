"""Images per second and core: our loader against torchvision's and timm's. `make bench-loader`.

The same JPEGs of ImageNet's size, the same crops (random resized crop to 224, flip, normalised), as many threads or
workers as there are cores. Each contender is a process of its own; they take turns, an epoch each. Images are counted
per second of CPU time, over all threads and workers: so a busy machine does not alter the ratio. Ours reads the .beton
file that `data.write` makes of the folder by default: JPEGs of quality 90 too, with restart markers.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.common import ROOT, claim, markdown
from data.sources import ImageFolder
from data.write import write

TARGET = 3.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
KINDS = ("ours", "torchvision", "timm")


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Smooth random images with some grain, in four classes: at 500 x 375 as many bytes as ImageNet's, about 110 KB."""
    for index in range(count):
        rng = np.random.default_rng(index)
        image = np.zeros((height, width, 3), np.float32)
        for cells in (4, 16, 64):
            noise = rng.normal(0, 40, (cells, cells, 3)).astype(np.float32)
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        image += 128 + rng.normal(0, 9, image.shape)
        path = folder / f"class{index % 4}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])


def ours(photos: Path, beton: Path, size: int, batch: int, cores: int) -> Callable[[int], Iterable]:
    """Epochs of `data.train_loader`."""
    from data import train_loader

    loader = train_loader(
        beton, image_size=size, batch_size=batch, scale=SCALE, ratio=RATIO, mean=MEAN, std=STD, workers=cores
    )
    return lambda epoch: (batch["image"] for batch in loader.epoch(epoch))


def torchvision(photos: Path, beton: Path, size: int, batch: int, cores: int) -> Callable[[int], Iterable]:
    """Epochs of an ImageFolder, as torchvision's reference training reads one."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(size, scale=SCALE, ratio=RATIO), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ]  # fmt: skip
    folder = ImageFolder(str(photos), transforms.Compose(steps))
    loader = DataLoader(folder, batch, shuffle=True, num_workers=cores, drop_last=True)
    return lambda _: (images for images, _ in loader)


def timm(photos: Path, beton: Path, size: int, batch: int, cores: int) -> Callable[[int], Iterable]:
    """Epochs of timm's `create_loader` on its own dataset of a folder."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(photos)), (3, size, size), batch, is_training=True, use_prefetcher=False,
        scale=SCALE, ratio=RATIO, hflip=0.5, color_jitter=None, interpolation="bilinear", mean=MEAN, std=STD,
        num_workers=cores, persistent_workers=False,
    )  # fmt: skip
    return lambda _: (images for images, _ in loader)


def spent() -> float:
    """CPU seconds of this process, its threads and its ended workers."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def work(kind: str, *how: str) -> None:
    """A contender: for each line that comes it reads an epoch, and says how many images, and what they took."""
    photos, beton, size, batch, cores = how
    epoch_of = {"ours": ours, "torchvision": torchvision, "timm": timm}[kind](
        Path(photos), Path(beton), int(size), int(batch), int(cores)
    )
    for number, _ in enumerate(sys.stdin):
        before, since = spent(), time.perf_counter()
        images = sum(len(images) for images in epoch_of(number))
        taken = {"cpu": spent() - before, "seconds": time.perf_counter() - since}
        print(json.dumps({"images": images, **taken}), flush=True)
    os._exit(0)


def main() -> int:
    """The command line; returns the exit status."""
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--photos", type=Path, metavar="FOLDER", help="JPEGs in a subfolder per class, instead of made ones"
    )
    parser.add_argument("--images", type=int, default=1024, help="how many are made")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, of which the medians are printed")
    parser.add_argument("--tiny", action="store_true", help="see that it runs: few small images, one turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    images, rounds, size, batch, width, height = options.images, options.rounds, 224, 64, 500, 375
    if options.tiny:
        images, rounds, size, batch, width, height = 16, 1, 32, 4, 64, 48
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as made:
        photos, beton = options.photos or Path(made) / "photos", Path(made) / "photos.beton"
        if options.photos is None:
            make_photos(photos, images, width, height)
        folder = ImageFolder(photos)
        write(folder, beton, progress=False, classes=folder.classes)
        command = [sys.executable, "-m", "benchmarks.loader", "--work"]
        how = [str(photos), str(beton), str(size), str(batch), str(cores)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = {
            kind: subprocess.Popen(
                [*command, kind, *how], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for kind in KINDS
        }
        turns: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for _ in range(1 + rounds):  # the first warms the page cache, and compiles
            for kind, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                turns[kind].append(json.loads(process.stdout.readline()))
        for process in processes.values():
            process.stdin.close()
            process.wait()
        stored = sum(path.stat().st_size for path in photos.rglob("*.jpg")) / len(folder)
        each = beton.stat().st_size / len(folder)
        what = f"{len(folder)} JPEGs of {stored / 1e3:.0f} KB, {each / 1e3:.0f} KB in the file; {cores} cores, "
        what += f"{rounds} turns each"
    per_core = {kind: [turn["images"] / turn["cpu"] for turn in found[1:]] for kind, found in turns.items()}
    mine, rows, claims = per_core["ours"], [], []
    images_per_core = statistics.median(mine)
    for kind, found in per_core.items():
        ratio = statistics.median(a / b for a, b in zip(mine, found, strict=True))
        if kind != "ours":
            words, peer = f"images a core, over {kind}'s loader", statistics.median(found)
            claims.append(claim(words, images_per_core, TARGET, "/s", peer=peer, ratio=ratio, at_least=True))
        wall = statistics.median(turn["images"] / turn["seconds"] for turn in turns[kind][1:])
        rows.append([kind, f"{statistics.median(found):.0f}", f"{wall:.0f}", f"{ratio:.2f}"])
    if options.json:
        print(json.dumps({"rows": claims}))
        return 0
    print(f"{what}\n\n" + markdown(["loader", "images per CPU second", "images per second", "ours over it"], rows))
    print(f"target {TARGET:g} over each: {'met' if all(one['met'] for one in claims) else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
