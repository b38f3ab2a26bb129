"""What a step waits for, counted on real engines of two ranks; and that batches come to a device without a wait."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data import train_loader
from tests.conftest import ENVIRONMENT, ROOT

Counts = dict[str, dict[str, float]]


def counted(ranks: int) -> Counts:
    command = [sys.executable, str(ROOT / "tests/support/waits.py"), str(ranks)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counts() -> Counts:
    return counted(2)


def waits(found: dict[str, float]) -> dict[str, float]:
    """Of a step, without those once per call of the loop: the host's own questions before the first step."""
    collectives = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_", "barrier")
    return {k: v for k, v in found.items() if not k.startswith(collectives) and "on_any_rank" not in k}


def test_a_step_waits_once_for_the_norm(counts: Counts) -> None:
    """Whatever the stage, the ZeRO stage, the micro-batches and the parameter groups."""
    for case, found in counts.items():
        assert waits(found) == {"copy to the host engine.py:global_norm": 1.0}, case


def test_a_micro_batch_has_one_collective_of_its_own(counts: Counts) -> None:
    """The stop flag, which nothing waits for."""
    one, three = counts["one micro-batch"], counts["three micro-batches"]
    flag = "allreduce_ signals.py:__call__"
    assert (one.pop(flag), three.pop(flag)) == (1, 3)
    assert one == three


def test_the_norm_is_one_collective(counts: Counts) -> None:
    assert all(found["allreduce_ engine.py:global_norm"] == 1 for found in counts.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_torch_sees_one_wait() -> None:
    for case, found in counted(1).items():
        assert sum(found.values()) <= 1.5, (case, found)  # half: before the first of the two steps


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


def test_a_batch_comes_in_two_copies_that_nothing_waits_for(small: Path) -> None:
    """The images, and index, label and key together. The other device here is torch's `meta`."""
    loader = train_loader(small / "train.beton", image_size=32, batch_size=16, device="meta", workers=1)
    batches = loader.epoch()
    next(batches)
    with Copies() as copies:
        batch = next(batches)
    loader.close()
    assert copies.found == [True, True]
    assert {name: value.device.type for name, value in batch.items()} == dict.fromkeys(batch, "meta")
    assert batch["image"].shape == (16, 3, 32, 32) and batch["key"].dtype == torch.int64
