"""Shared by the trainer's tests: a small labelled data set, a small teacher file, and a way to run the program."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from data.write import write
from tests.support.zygote import Run, Zygote, free_port

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# Files of many minutes start first, so that two processes end together.
LONGEST = ("stages/test_stages", "ranks/test_signals", "engine/test_checkpoint", "setup/test_resolution")
ARCHITECTURE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 4}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: not any(f"{name}.py" in item.nodeid for name in LONGEST))


class Blobs:
    """Images of one of four colours in a noisy corner: [32, 32, 3] and a label."""

    classes = ("a", "b", "c", "d")

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index >= self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        label = index % 4
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image[:16, :16] = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=np.uint8)[label]
        return image, label


class Patches:
    """Noise with a rectangle of one of two colours, and its mask; the first rows are not labelled."""

    mask_classes = ("noise", "red", "green")

    def __init__(self, count: int, seed: int, sizes: tuple[tuple[int, int], ...] = ((32, 32),)) -> None:
        self.count, self.seed, self.sizes = count, seed, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        (height, width), which = self.sizes[index % len(self.sizes)], index % 2
        image, mask = rng.integers(0, 256, (height, width, 3), dtype=np.uint8), np.zeros((height, width), np.uint8)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        part = slice(top, top + height // 2), slice(left, left + width // 2)
        image[part], mask[part], mask[:2] = [[255, 0, 0], [0, 255, 0]][which], 1 + which, 255
        return {"image": image, "mask": mask}


def write_small(folder: Path) -> Path:
    """Fills a folder with train.beton (96 images), val.beton (22), teacher.safetensors and recipe.yaml.

    And, with masks, masked.beton (24) and masked_val.beton (13, of three sizes).
    """
    write(Blobs(96, 0), folder / "train.beton", raw_share=1.0, progress=False)
    write(Blobs(22, 1), folder / "val.beton", raw_share=1.0, progress=False)
    write(Patches(24, 0), folder / "masked.beton", raw_share=1.0, progress=False)
    sizes = ((32, 32), (40, 48), (24, 36))
    write(Patches(13, 1, sizes), folder / "masked_val.beton", raw_share=1.0, progress=False)
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, **ARCHITECTURE)
    with torch.no_grad():
        for block in teacher.blocks:
            block.attn.qkv.weight.mul_(20)  # attention that matters
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    recipe = {
        "teacher": {
            "name": "vit_tiny_patch16_224",
            "kwargs": ARCHITECTURE,
            "weights": str(folder / "teacher.safetensors"),
        },
        "data": {
            "train": str(folder / "train.beton"),
            "val": str(folder / "val.beton"),
            "image_size": 32,
            "workers": 1,
        },
        "train": {"batch_size": 16, "bf16": False, "steps": 6, "lr": 1e-3, "log_every": 1, "save_every": 1000},
        "tracking": [],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `write_small` fills."""
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full disk is tested on a tmpfs, which only root can mount")
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a full disk is tested on a tmpfs, and this machine does not mount one: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# One thread a process: tiny tensors, and two ranks on two cores. No hub is asked.
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class Result:
    """How a run of the program ended."""

    def __init__(self, code: int, out: str, err: str, folder: Path) -> None:
        self.code, self.out, self.err, self.folder = code, out, err, folder

    def lines(self, split: str) -> list[dict]:
        """The metrics lines of `split`."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["split"] == split]

    @property
    def error(self) -> str:
        """The one line of a user's mistake; checks that it is one, and that there is no traceback."""
        assert self.code == 2, f"{self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out, self.err
        said = [line for line in (self.out + self.err).splitlines() if line.startswith("error: ")]
        assert len(said) == 1, self.err
        return said[0]


@functools.cache
def zygote(beton: Path) -> Zygote:
    """The process that the program's runs are forked from."""
    return Zygote(ENVIRONMENT, beton)


def run_trainer(
    small: Path, run: Path, stage: int | str, *options: str, ranks: int = 1, timeout: int = 400, launcher: bool = False
) -> Result:
    """`trainer/run.py` on the small data set: forked, or started as a user does.

    Args:
        launcher: by the real `python`, or the real `deepspeed` when `ranks` is above 1; takes 8 s longer.
    """
    argv = ["--config", str(small / "recipe.yaml"), "--stage", str(stage), "--run", str(run), *options]
    folder = run / (f"stage{stage}" if str(stage).isdigit() else stage)
    if launcher:
        world = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        start = [sys.executable] if ranks == 1 else [str(BIN / "deepspeed"), *world]
        command = [*start, "trainer/run.py", *argv]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
        return Result(done.returncode, done.stdout, done.stderr, folder)
    with tempfile.TemporaryDirectory() as log:
        forked = Run(zygote(small / "train.beton"), argv, Path(log), ranks)
        code = forked.wait(timeout)
        return Result(code, forked.text("out"), forked.text("err"), folder)


def curve(folder: Path, *splits: str) -> list[dict]:
    """A stage's metrics lines of `splits` (default: all), without what measures time."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timing = {"images_per_second", "seconds_per_step", "data_wait", "save_wait", "peak_memory_gib", "tflops", "mfu",
              "mfu_teacher", "mfu_student", "mfu_operator", "time"}  # fmt: skip
    return [
        {k: v for k, v in line.items() if k not in timing} for line in lines if line["split"] in splits or not splits
    ]


def forget_after(folder: Path, step: int) -> None:
    """Leave a stage's folder as a run that was killed at `step` leaves it."""
    shutil.rmtree(folder / "export", ignore_errors=True)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
