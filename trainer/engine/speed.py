"""How fast a run is: images and FLOPs per second, waits, memory; and what the device could do."""

import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.engine.profile import Mark, part

# Dense bf16 TFLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits.
PEAKS = {
    r"B200": 2250, r"H100.*PCIe": 756, r"H100 NVL": 835, r"H100|H200|GH200": 989, r"H800": 989, r"H20\b": 148,
    r"A100|A800": 312, r"A40\b": 150, r"A30\b": 165, r"A10G": 70, r"A10\b": 125, r"L40S": 362, r"L40\b": 181,
    r"L4\b": 121, r"RTX 6000 Ada": 364, r"RTX A6000": 155, r"RTX 5090": 210, r"RTX 4090": 165, r"RTX 3090": 71,
}  # fmt: skip


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """FLOP/s that a device can reach; None for one that is not in the table, such as a CPU.

    Args:
        bf16: else fp32 in TF32, at half the speed.
    """
    found = next((peak for name, peak in PEAKS.items() if re.search(name, device_name)), None)
    return None if found is None else found * 1e12 / (1 if bf16 else 2)


@dataclass(frozen=True)
class Flops:
    """FLOPs per image of a training step, a multiplication and an addition being two, recomputation left out.

    Attributes:
        teacher: forward, of all frozen models beside the student.
        student: forward and backward.
        operator: of the student's FLOPs those between the attentions' projections, in all linear blocks.
        peak: FLOP/s of the device, where it is known.
    """

    teacher: float
    student: float
    operator: float
    peak: float | None = None


class Clock:
    """Images and FLOPs per second, and shares of time spent waiting for data and for checkpoints, since the last look.

    On a GPU the wait for data is the device's: from the moment when it has nothing to do until the images are there.
    """

    def __init__(self, step: int, device: torch.device) -> None:
        self.device = device
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new reading at `step`."""
        self.step, self.stood, self.since = step, 0.0, time.perf_counter()
        self.waits: list[tuple[Mark, Mark]] = []

    def waiting_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, the time that each took noted."""
        while True:
            with part("data"):
                began = Mark(self.device)
                batch = next(batches)
                self.waits.append((began, Mark(self.device)))
            yield batch

    def standing_still(self, work: Callable[..., None], *args: Any) -> None:
        """Do what training waits for."""
        began = time.perf_counter()
        work(*args)
        self.stood += time.perf_counter() - began

    def rates(self, step: int, batch_size: int, ranks: int, flops: Flops | None) -> dict[str, float | None]:
        """Ends the reading at `step`, to which the device has come, and begins the next.

        Args:
            batch_size: images per step, over all ranks.
            flops: of an image, where they are known.
        """
        elapsed = time.perf_counter() - self.since
        speed = (step - self.step) * batch_size / elapsed
        waited = sum(began.seconds_to(ended) for began, ended in self.waits)
        values: dict[str, float | None] = {
            "images_per_second": speed,
            "seconds_per_step": elapsed / max(1, step - self.step),
            "data_wait": waited / elapsed,
            "save_wait": self.stood / elapsed,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if flops is not None:
            both, each = flops.teacher + flops.student, speed / ranks
            values["tflops"] = each * both / 1e12
            parts = {"": both, "_teacher": flops.teacher, "_student": flops.student, "_operator": flops.operator}
            for name, count in parts.items():
                values[f"mfu{name}"] = None if flops.peak is None else each * count / flops.peak
        self.restart(step)
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process held: of torch's allocator on a GPU, else of the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
